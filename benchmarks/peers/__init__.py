"""What a Python user would pick instead of us; `dovecote bench peers` measures them beside us."""
