"""What the README's numbers come from: `dovecote bench NAME`. In the checkout only, never in the wheel."""
