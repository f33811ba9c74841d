"""Mutants of what limits codes and answers, binds them, and removes what is over."""

from tests.mutations.mutant import Mutant

CODES = "tests/security/test_codes.py"
SENT = "tests/security/test_codes_sent.py"
PURGING = "tests/security/test_purging.py"
CHALLENGE = "tests/domain/verification/test_challenge.py"
SERVICE_PY = "domain/verification/service.py"
LIMITS_PY = "domain/verification/limits.py"
CHALLENGE_PY = "domain/verification/challenge.py"
REPOSITORY_PY = "domain/verification/repository.py"

VERIFICATION = (
    Mutant(
        "wrong answers are not carried over to the next challenge",
        SERVICE_PY,
        "        quota.count_answer(at)\n",
        "        pass\n",
        f"{CODES}::test_a_challenge_after_the_other_does_not_give_more_guesses",
    ),
    Mutant(
        "an answer is judged in a lock-out",
        SERVICE_PY,
        "        require_answer(counted, at)\n",
        "",
        f"{CODES}::test_accounts_that_answer_at_the_same_time_have_ten_guesses_together",
    ),
    Mutant(
        "a code is sent for a number that is locked out",
        LIMITS_PY,
        "        yield from self.answer_waits()\n",
        "",
        f"{CODES}::test_a_lock_out_says_its_end_and_ends_then",
    ),
    Mutant(
        "codes are not counted",
        SERVICE_PY,
        "        quota.count_code(at)\n",
        "        pass\n",
        f"{CODES}::test_a_double_click_leaves_the_first_code_as_it_is",
    ),
    Mutant(
        "there is no pause between codes",
        LIMITS_PY,
        "        yield CodeRequestedTooSoon, _free_at(self.codes_at, 1, self.allowance.pause)\n",
        "",
        f"{CODES}::test_of_many_requests_at_the_same_time_one_is_sent",
    ),
    Mutant(
        "codes are not limited by the day",
        LIMITS_PY,
        "        yield TooManyCodesToday, _free_at(self.codes_at, self.allowance.codes_a_day, DAY)\n",
        "",
        f"{CODES}::test_codes_are_limited_by_the_hour_and_by_the_day",
    ),
    Mutant(
        "a time later than the present does not count",
        LIMITS_PY,
        "if until is not None and at < until]",
        "if until is not None and until - HOUR <= at < until]",
        f"{CODES}::test_a_clock_that_is_set_back_does_not_lift_a_limit",
    ),
    Mutant(
        "the refusal that is shown ends before the others do",
        LIMITS_PY,
        "max(still, key=lambda wait: wait[0])",
        "min(still, key=lambda wait: wait[0])",
        f"{CODES}::test_asking_during_a_lock_out_makes_it_no_longer",
    ),
    Mutant(
        "one account may use up what a number has",
        LIMITS_PY,
        "user: Allowance = Allowance(codes_an_hour=5, codes_a_day=10, answers_an_hour=7)",
        "user: Allowance = Allowance(codes_an_hour=6, codes_a_day=12, answers_an_hour=10)",
        f"{CODES}::test_one_account_alone_locks_nobody_out",
    ),
    Mutant(
        "what was counted is not read",
        REPOSITORY_PY,
        'set_={"subject": asked.excluded.subject}',
        'set_={"codes_at": []}',
        f"{CODES}::test_of_many_requests_at_the_same_time_one_is_sent",
    ),
    Mutant(
        "a refusal leaves an empty count behind",
        SERVICE_PY,
        "no empty count is committed.\n    with uow.session.begin_nested():\n",
        "no empty count is committed.\n    if True:\n",
        f"{CODES}::test_a_refusal_writes_nothing_even_where_the_caller_goes_on",
    ),
    Mutant(
        "anybody may answer a challenge",
        REPOSITORY_PY,
        "if challenge is None or challenge.user_id != user_id:",
        "if challenge is None:",
        f"{CODES}::test_somebody_else_s_challenge_is_not_found_and_not_judged",
    ),
    Mutant(
        "a code is sent to landlines and premium numbers",
        "domain/verification/phone.py",
        "if not is_mobile or region",
        "if region",
        f"{CODES}::test_a_code_goes_to_mobile_phones_only",
    ),
    Mutant(
        "a code is sent to satellite phones",
        "domain/verification/phone.py",
        "if not is_mobile or region == phonenumbers.REGION_CODE_FOR_NON_GEO_ENTITY:",
        "if not is_mobile:",
        f"{CODES}::test_a_code_goes_to_mobile_phones_only",
    ),
    Mutant(
        "a code is sent for an event that did not issue the challenge",
        CHALLENGE_PY,
        "        if not hmac.compare_digest(hash_of(keys, self.id, code), self.code_hash):\n",
        "        if False:\n",
        f"{SENT}::test_a_request_with_another_challenge_s_id_sends_nothing",
    ),
    Mutant(
        "an answer of any length is looked at",
        CHALLENGE_PY,
        "if len(answer) > _MAX_TYPED_CHARACTERS:",
        "if False:",
        f"{CHALLENGE}::test_what_is_no_code_is_not_judged",
    ),
    Mutant(
        "the relay does not remove what is over",
        "dovecote/bootstrap.py",
        "Maintainer(settings, app.routes, app.purges).start",
        "Maintainer(settings, app.routes).start",
        f"{PURGING}::test_the_relay_removes_it_by_itself",
    ),
    Mutant(
        "what is over waits for those who use a row",
        REPOSITORY_PY,
        ".order_by(challenges.c.expires_at)\n            .limit(limit)\n            .with_for_update(skip_locked=True)",
        ".order_by(challenges.c.expires_at)\n            .limit(limit)\n            .with_for_update(nowait=True)",
        f"{PURGING}::test_it_takes_more_than_a_batch_and_waits_for_nobody",
    ),
)
