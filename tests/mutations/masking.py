"""Lines that keep hostile texts from taking long, and from reaching a terminal."""

from tests.mutations.mutant import Mutant

GROWTH = "tests/security/test_masking.py"
TERMINALS = "tests/security/test_terminals.py"

MASKED = "dovecote/masking.py"
FAILURES = "dovecote/telemetry/failures.py"
SHOWING = "dovecote/errors.py"
TERMINAL = "dovecote/processes/terminal.py"
OUTPUT = "dovecote/cli/output.py"

MASKING = (
    # Linear and bounded ---------------------------------------------------------------------------
    Mutant(
        "a text is masked before it is cut",
        MASKED,
        "    if len(text) <= most:\n",
        "    if most:\n",
        f"{GROWTH}::test_what_is_kept_of_an_error_is_bounded_however_large_it_is",
    ),
    Mutant(
        "what is hidden makes a text longer than its bound",
        MASKED,
        'return first[:half] + _GAP + (last[-half:] if half else "")',
        "return first + _GAP + last",
        f"{GROWTH}::test_what_is_kept_of_an_error_is_bounded_however_large_it_is",
    ),
    Mutant(
        "a secret that straddles a cut shows its first half",
        MASKED,
        "        if span.end <= at or span.start >= end:",
        "        if span.end <= at or span.end > end:",
        f"{GROWTH}::test_a_secret_that_straddles_a_cut_shows_no_part_of_itself",
    ),
    Mutant(
        "a password that the cut parts from its host is shown",
        MASKED,
        "            if host < 0 and not ends and at + len(part) == len(text):",
        "            if False:",
        f"{GROWTH}::test_a_secret_that_straddles_a_cut_shows_no_part_of_itself",
    ),
    Mutant(
        "a token is searched for from each of its letters",
        MASKED,
        r"(?<![\w-])eyJ[\w-]{8,}(?:\.[\w-]*){0,2}",
        r"\beyJ[\w-]{8,}\.[\w-]+\.[\w-]*",
        f"{GROWTH}::test_no_pattern_takes_more_than_thrice_as_long_for_twice_the_text",
    ),
    Mutant(
        "masked texts stay in memory",
        MASKED,
        "        if found == text and not values and",
        "        if",
        f"{GROWTH}::test_nothing_that_was_masked_is_kept_in_memory",
    ),
    Mutant(
        "a message is fingerprinted whole",
        FAILURES,
        "_message(error)[:_MAX_MESSAGE]",
        "_message(error)",
        f"{GROWTH}::test_what_is_kept_of_an_error_is_bounded_however_large_it_is",
    ),
    Mutant(
        "all members of a group are shown",
        FAILURES,
        "group.exceptions[: _MAX_MEMBERS if deepest else 0]",
        "group.exceptions",
        f"{GROWTH}::test_what_is_kept_of_an_error_is_bounded_however_large_it_is",
    ),
    Mutant(
        "a chain is fingerprinted whole",
        FAILURES,
        "for cause in islice(causes(error), _MAX_CAUSES)]\n",
        "for cause in causes(error)]\n",
        f"{GROWTH}::test_what_is_kept_of_an_error_is_bounded_however_large_it_is",
    ),
    Mutant(
        "a large number is written in decimal",
        SHOWING,
        "            if value.bit_length() <= _MAX_BITS:",
        "            if True:",
        f"{GROWTH}::test_numbers_that_python_cannot_write_are_refused_in_words",
    ),
    Mutant(
        "an error holds a payload's value whole",
        "dovecote/events/__init__.py",
        'raise ValueError(f"expected {wanted.__name__}, got {shown(value)}")',
        'raise ValueError(f"expected {wanted.__name__}, got {value!r}")',
        f"{GROWTH}::test_an_event_with_a_hostile_value_fails_by_itself_within_milliseconds",
    ),
    Mutant(
        "the name of a setting is searched for from each letter of a parameter",
        "dovecote/consumer/transaction_guard.py",
        r"(?<![\w$])[^\W\d]",
        r"[^\W\d]",
        f"{GROWTH}::test_no_pattern_takes_more_than_thrice_as_long_for_twice_the_text",
    ),
    # Terminals ------------------------------------------------------------------------------------
    Mutant(
        "what is not ASCII is obeyed",
        TERMINAL,
        "        elif not character.isprintable() or marks > _MAX_MARKS:",
        '        elif character < "\\x80" and not character.isprintable() or marks > _MAX_MARKS:',
        f"{TERMINALS}::test_lines_of_supervised_processes_are_harmless",
    ),
    Mutant(
        "accents are piled up",
        TERMINAL,
        " or marks > _MAX_MARKS:",
        ":",
        f"{TERMINALS}::test_any_text_becomes_one_line_that_no_terminal_obeys",
    ),
    Mutant(
        "a traceback forges lines",
        TERMINAL,
        "_INDENT + plain(line) for line",
        "plain(line) for line",
        f"{TERMINALS}::test_log_lines_for_people_are_harmless",
    ),
    Mutant(
        "a supervised process is obeyed",
        TERMINAL,
        'f"{before}{plain(text)}\\n"',
        'f"{before}{text}\\n"',
        f"{TERMINALS}::test_lines_of_supervised_processes_are_harmless",
    ),
    Mutant(
        "a terminal without UTF-8 ends the command",
        TERMINAL,
        'ours.encode(encoding, "backslashreplace")',
        "ours.encode(encoding)",
        f"{TERMINALS}::test_a_terminal_without_utf_8_gets_what_it_has",
    ),
    Mutant(
        "a cell breaks its line",
        OUTPUT,
        'terminal.plain("" if line is None else str(line)) for line in lines',
        '"" if line is None else str(line) for line in lines',
        f"{TERMINALS}::test_rich_itself_may_still_draw_and_colour",
    ),
    Mutant(
        "a wide cell pushes the others out of sight",
        OUTPUT,
        "        if len(one) > _MAX_CELL:",
        "        if False:",
        f"{TERMINALS}::test_a_wide_cell_does_not_push_the_others_out_of_sight",
    ),
    Mutant(
        "a wrong word is obeyed",
        "dovecote/cli/__init__.py",
        "    except _WRONG_COMMAND as error:\n        _refuse_command(error)\n",
        "    except _WRONG_COMMAND as error:\n        error.show()\n        raise SystemExit(2) from None\n",
        f"{TERMINALS}::test_no_command_lets_anything_through",
    ),
    Mutant(
        "a log line for people is obeyed",
        "dovecote/telemetry/logs.py",
        "        last.append(_legible)\n",
        "        pass\n",
        f"{TERMINALS}::test_log_lines_for_people_are_harmless",
    ),
    Mutant(
        "a number that Python cannot write ends the command",
        "dovecote/envelope/stored_json.py",
        "return int(digits) if len(digits) <= _MAX_DIGITS else _short(digits)",
        "return int(digits)",
        "tests/dovecote/envelope/test_envelope.py::test_of_a_number_that_python_cannot_write_a_command_shows_the_beginn"
        "i"
        "n"
        "g",
    ),
)
