"""Helpers of tests: servers and processes (processes, commands, system, proxy, pooling), data (rows, quotes, keys,
phone_numbers, outbox_rows, past_weeks), roles (logins), and what looks at results (effects, exact_counts, scraping)."""
