/* How the relay reads the outbox forward without losing anyone: DESIGN section 4, ADR 0003.
 *
 * Writers take positions from a sequence and commit in any order; they announce a low-water mark before their
 * first position. The reader asks for the safe position and the active writers, then for rows above its high-water
 * mark, then which writers have ended, then for rows that have appeared in the gaps that these could fill. It may
 * use the safe position of the read before. It may die after sending a batch and before recording it, and start again.
 * Every step that is atomic in Postgres is one step here, and Spin tries every order of them.
 *
 * In the code:  dovecote/migrations/sql (announce in 0002_outbox, active_writers in 0003_relay), dovecote/store/reader.py
 *               (Reader), dovecote/store/gaps.py (Writers, behind_unread).
 * Checked:      tests/models/test_models.py, which also breaks each assumption by its -D name.
 * Not in here:  the wake-up lock, savepoints (a mark released with its positions is a transaction rolled back),
 *               the loss of Postgres' last records (it is a death before recording).
 */

#ifndef WRITERS
#define WRITERS 2
#define EVENTS  2                        /* most events of one transaction */
#endif
#define MOST    (WRITERS * EVENTS)       /* positions: a set of them fits into a byte */
#define BATCH   2                        /* rows of one read, so that reads are cut short too */
#define NONE    255                      /* no mark  */
#define HAS(set, position)  (((set) >> (position)) & 1)
#define ONE(position)       (1 << (position))
#define UPTO(position)      ((1 << ((position) + 1)) - 1)

byte sequence;                           /* the highest position handed out */
byte visible;                            /* positions of committed rows */
byte marks[WRITERS] = NONE;             /* the advisory locks of active writers  */
byte over;                               /* the writers whose end a new snapshot sees */
byte unnumbered;                         /* of these, whose transaction's lock is released; the mark may be held */
bool row_locked[2];                      /* an aggregate's row, locked by the transaction that changed it */
bit  aggregate[8];                       /* whose event has which position */
byte writers_left = WRITERS;

byte recorded, checkpoint;               /* published_batches and relay_state */
byte sent;                               /* what has reached the queues, ever */
byte deaths = 1;

/* A transaction of one or two events of one aggregate, which commits or not. */
proctype writer(byte me) {
    byte mine, mark, position, events;
    bit whose;

    select(events : 1 .. EVENTS);
    if
    :: whose = 0
    :: me > 0 -> whose = 1               /* the first is the first of its kind, whichever that is */
    fi;
#ifndef ROW_NOT_LOCKED
    atomic { !row_locked[whose] -> row_locked[whose] = true }
#endif
#ifndef LOCK_AFTER_POSITION
    mark = sequence;                    /* the trigger: it looks, */
    marks[me] = mark;                  /* and then takes its lock */
#endif
    do
    :: events > 0 && sequence < MOST ->
        d_step { sequence++; position = sequence; aggregate[position] = whose; mine = mine | ONE(position); events-- }
#ifdef LOCK_AFTER_POSITION
        if
        :: marks[me] == NONE -> mark = sequence; marks[me] = mark
        :: else
        fi
#endif
    :: else -> break
    od;
#ifdef LOCK_RELEASED_BEFORE_COMMIT
    marks[me] = NONE;
#endif
    if
    :: d_step {
        assert((mine & UPTO(checkpoint)) == 0);      /* nothing appears below the checkpoint */
        visible = visible | mine; over = over | ONE(me)
       }
    :: over = over | ONE(me)             /* rolled back: its positions are gone for ever */
    fi;
    d_step {                             /* locks are released only after the commit is visible: */
        row_locked[whose] = false; unnumbered = unnumbered | ONE(me)
    }
    d_step {                             /* those of the transaction first, and then the mark  */
        marks[me] = NONE;
        mine = 0; mark = 0; position = 0; whose = 0;
        writers_left--
    }
}

/* The first rows of a set, at most a batch of them. */
inline take(set, rows, newest) {
    d_step {
        rows = 0; newest = 0; taken = 0; p = 1;
        do
        :: p <= MOST && taken < BATCH ->
            if
            :: HAS(set, p) -> rows = rows | ONE(p); newest = p; taken++
            :: else
            fi;
            p++
        :: else -> break
        od;
        p = 0
    }
}

inline read_sequence() {
    last_position = sequence
}

inline read_marks() {
    d_step {
        safe = NONE; p = 0;
        do
        :: p < WRITERS ->
            safe = (marks[p] < safe -> marks[p] : safe); p++
        :: else -> break
        od;
        p = 0
    }
}

/* A second look, and none where the first has shown that no writer can own a position below the safe one. */
inline read_writers() {
    d_step {
        p = 0;
        do
        :: p < WRITERS ->
            seen_before[p] = seen[p];
            seen[p] = (safe < last_position && !HAS(unnumbered, p) -> marks[p] : NONE);
            p++
        :: else -> break
        od;
        p = 0
    }
}

#ifdef OVER_BY_LOCKS
#define IS_OVER(writer)  (marks[writer] == NONE)
#else
#define IS_OVER(writer)  HAS(over, writer)
#endif
#ifdef ONLY_THE_LAST_LOOK
#define EARLIER(writer)  NONE
#else
#define EARLIER(writer)  seen_before[writer]
#endif

/* Above what something may have turned up: the lowest mark of those of the last two looks that have ended. */
inline ask_who_has_ended() {
    d_step {
        lowest = unseen_above; p = 0;
        do
        :: p < WRITERS ->
            if
            :: IS_OVER(p) ->
                lowest = (seen[p] < lowest -> seen[p] : lowest);
                lowest = (EARLIER(p) < lowest -> EARLIER(p) : lowest)
            :: else
            fi;
            p++
        :: else -> break
        od;
        p = 0
    }
}

inline read_beyond() { take(visible & ~UPTO(high_water), beyond, newest_beyond); beyond_cut = (taken == BATCH) }

/* One that ended in between may have left a row above that mark and one below: both or none. */
inline read_late() {
    do
    ::  take(visible & gaps & ~UPTO(lowest), late, newest_late); late_cut = (taken == BATCH);
#ifndef ASKED_ONCE
        if
        :: late != 0 -> looked_above = lowest; ask_who_has_ended()
        :: else -> break
        fi;
        if
        :: lowest >= looked_above -> break
        :: else
        fi
#else
        break
#endif
    od;
    looked_above = 0
}

/* With a full batch of late rows: those beyond go along before which no row is left in the gaps of their aggregate. */
inline hold_back() {
    d_step {
        p = 1; behind[0] = false; behind[1] = false;
        do
        :: p <= MOST ->
            if
            :: HAS(visible & gaps & ~late & ~UPTO(newest_late), p) -> behind[aggregate[p]] = true
            :: else
            fi;
#ifndef BEYOND_GOES_ALONG
            if
            :: HAS(beyond, p) && behind[aggregate[p]] -> beyond = beyond & ~ONE(p)
            :: else
            fi;
#endif
            p++
        :: else -> break
        od;
        p = 0; behind[0] = false; behind[1] = false
    }
}

/* Put rows on the queues, in order. */
inline send(rows) {
    d_step {
        p = 1;
        do
        :: p <= MOST ->
            if
            :: HAS(rows, p) ->
                assert(!HAS(by_this_reader, p));             /* nothing twice by one reader */
                assert(p > newest_of[aggregate[p]]);         /* an aggregate's events in order */
                newest_of[aggregate[p]] = p;
                by_this_reader = by_this_reader | ONE(p);
                sent = sent | ONE(p)
            :: else
            fi;
            p++
        :: else -> break
        od;
        p = 0
    }
}

active proctype reader() {
    byte high_water, gaps, last_position, safe, beyond, late, newest_beyond, newest_late;
    byte by_this_reader, taken, p, next_checkpoint;
    byte newest_of[2], seen[WRITERS], seen_before[WRITERS], unseen_above, lowest, looked_above;
    bool beyond_cut, late_cut, behind[2], looked;

start_again: true;
    d_step {                             /* from what is recorded: the gaps come back with the batches */
        high_water = checkpoint; p = 1;
        by_this_reader = recorded; newest_of[0] = 0; newest_of[1] = 0;
        do
        :: p <= MOST ->
            if
            :: HAS(recorded, p) ->
                newest_of[aggregate[p]] = p;
                high_water = (p > high_water -> p : high_water)
            :: else
            fi;
            p++
        :: else -> break
        od;
        p = 0;
        gaps = UPTO(high_water) & ~UPTO(checkpoint) & ~recorded;
        next_checkpoint = checkpoint;
        unseen_above = 0; looked = false; p = 0;
        do
        :: p < WRITERS -> seen[p] = NONE; seen_before[p] = NONE; p++
        :: else -> break
        od;
        p = 0
    }
    do
    ::
#if defined(ROWS_BEFORE_WATERMARK)
        read_beyond(); read_sequence(); read_marks(); read_writers(); ask_who_has_ended(); read_late();
#elif defined(MARKS_BEFORE_SEQUENCE)
        read_marks(); read_sequence(); read_writers(); read_beyond(); ask_who_has_ended(); read_late();
#elif defined(LATE_BEFORE_BEYOND)
        read_sequence(); read_marks(); read_writers(); ask_who_has_ended(); read_late(); read_beyond();
#elif defined(OVER_BEFORE_BEYOND)
        read_sequence(); read_marks(); read_writers(); ask_who_has_ended(); read_beyond(); read_late();
#else
        if
        :: read_sequence();                    /* the order is the proof */
           read_marks();
           read_writers();
           looked = true
#ifdef AT_ONCE
        :: looked                        /* by the safe position of the read before */
#endif
        fi;
        read_beyond();
        ask_who_has_ended();
        read_late();
#endif
        if
        :: late_cut -> hold_back()
        :: else
        fi;
        d_step {
            newest_beyond = (beyond_cut -> newest_beyond
                             : (last_position > newest_beyond -> last_position : newest_beyond));
            newest_beyond = (newest_beyond > high_water -> newest_beyond : high_water);
            gaps = (gaps | (UPTO(newest_beyond) & ~UPTO(high_water))) & ~late & ~beyond;
            high_water = newest_beyond;
#ifdef NO_MORE_THAN_THE_WRITERS
            unseen_above = NONE;
#else
            unseen_above = last_position;
#endif
            if
            :: late_cut ->              /* more have turned up than one batch takes */
#ifndef REST_NOT_LOOKED_INTO
                unseen_above = 0
#endif
            :: else ->
                safe = (last_position < safe -> last_position : safe);
                gaps = gaps & ~UPTO(safe);
#ifdef CHECKPOINT_AT_HIGH_WATER
                safe = high_water;
#endif
                next_checkpoint = (safe < high_water
                                   -> (safe > next_checkpoint -> safe : next_checkpoint)
                                   : (high_water > next_checkpoint -> high_water : next_checkpoint))
            fi;
#ifndef AT_ONCE
            last_position = 0; safe = 0;
#endif
            newest_beyond = 0; newest_late = 0; taken = 0; lowest = 0;
            beyond_cut = false; late_cut = false
        }
#ifdef RECORDED_BEFORE_SENT
        d_step { recorded = recorded | late | beyond; checkpoint = next_checkpoint }
        if
        :: deaths > 0 -> deaths--; late = 0; beyond = 0; goto start_again
        :: true
        fi;
#endif
        if
        :: (late | beyond) != 0 -> send(late | beyond)
        :: else
        fi;
        if
        :: deaths > 0 -> deaths--; late = 0; beyond = 0; goto start_again          /* sent, and not recorded */
        :: true
        fi;
#ifndef RECORDED_BEFORE_SENT
        recorded = recorded | late | beyond;
        if
        :: checkpoint = next_checkpoint
        :: (late | beyond) != 0          /* it follows once a second, not with each batch */
        fi;
        late = 0; beyond = 0;
#endif
        assert((visible & UPTO(checkpoint) & ~sent) == 0);   /* the checkpoint leaves no row behind */
        if
        :: writers_left == 0 && checkpoint == sequence -> break
        :: else
        fi
    od;
    assert(sent == visible)              /* the checkpoint has come to the end, and no row is lost */
}

init {
    byte number;
    atomic {
        do
        :: number < WRITERS -> run writer(number); number++
        :: else -> break
        od
    }
}

/* Under fairness everything committed is sent, and the checkpoint comes to the end. */
ltl all_is_sent { <> (writers_left == 0 && sent == visible && checkpoint == sequence) }
