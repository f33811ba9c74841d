/* Postgres goes back: what two relays and a consumer make of it. In hand_over.pml Postgres never forgets.
 *
 * At any moment the database is as it was at some earlier one, all at once: a failover to a replica that was behind, a
 * restored disk, a crash with asynchronous commits. Every session ends with that, and the server is another run of
 * Postgres. A machine that goes back with its memory (SAME_RUN) is the same run; then only the beat tells, and it can
 * tell only what is older than itself (BEAT_BETWEEN). Redis may be flushed, and relays are killed and start again. A
 * consumer commits what it has in hand whenever it likes, and acknowledges it later still.
 *
 * Promised: what Postgres has in the end is done, and nothing is done that it does not have.
 *
 * In the code:  workers/relay/history.py, workers/relay/marker.py, workers/lua/{claim,beat,drop,publish}.lua.
 * Checked:      tests/models/test_models.py, which also breaks each assumption by its -D name.
 * Not in here:  two databases at once (the right of way), Redis' own memory snapshots, lost replies of Redis, and that
 *               a batch is not recorded by an old epoch (hand_over.pml).
 */
#ifndef EVENTS
#define EVENTS 2
#endif
#ifndef BACKS
#define BACKS   1                        /* how often each kind of trouble comes */
#define DEATHS  1
#define FLUSHES 1
#endif

#define NOBODY 0
#define HISTORIES 6

/* Postgres. An event is a bit, and its identity is when it was born: what is lost is written anew as another. */
byte events, recorded, done;             /* outbox, published_batches, processed_events */
byte epoch, history, beat;               /* relay_state, relay_beat */
bool known;                              /* relay_state: the Redis that holds what is recorded, with this epoch in it */
byte known_marker;
byte s_run;                              /* relay_state.instance */
byte runs = 1;                           /* of the server; never goes back */
byte born;                               /* how many events were ever written */
byte holder = NOBODY;                    /* of the leader's lock */

/* An earlier state of it, as a backup or a replica has it */
byte b_events, b_recorded, b_done, b_epoch, b_history, b_beat, b_marker, b_run;
bool b_known, has_backup;

/* Redis. A message is an event and the history that salts its id. */
byte queued[HISTORIES];
byte marker, r_history, r_run, r_beat;
byte begun;                              /* how many histories were ever begun: each is another */

/* The two relays, 1 and 2 */
bool killed[3], session[3];

#define STATEMENT  if :: !session[me] -> goto again :: else fi    /* the session may have ended */

#ifdef NO_RUN
#define SAME_RUN_AS_KNOWN  true
#else
#define SAME_RUN_AS_KNOWN  (r_run == my_run)
#endif
#ifdef NO_BEAT
#define SAME_BEAT  true
#else
#define SAME_BEAT  (told <= r_beat && r_beat <= my_beat)
#endif
#ifdef BEAT_BETWEEN
#define MAY_GO_BACK  (r_beat > b_beat)
#else
#define MAY_GO_BACK  true
#endif
#ifdef DROP_UNFENCED
#define MAY_DROP  (marker == mine)
#else
#define MAY_DROP  (marker == mine && r_history == my_history)
#endif
#ifdef NO_SALT
#define SALT  0
#else
#define SALT  my_history
#endif
#ifdef ACTS_ON_ANY
#define ACTS  true
#else
#define ACTS  ((hand & events) != 0)
#endif

/* One call of publish.lua */
inline publish(what) {
    atomic {
        if
        :: marker > mine -> goto again
        :: marker < mine || r_history != my_history -> goto greet
        :: else -> queued[SALT] = queued[SALT] | (what)
        fi
    }
}

inline forget_queues() {
    queued[0] = 0; queued[1] = 0; queued[2] = 0; queued[3] = 0; queued[4] = 0; queued[5] = 0
}

active [2] proctype relay() {
    byte me, mine, my_history, my_run, my_beat, told, as_seen, lost, batch, expected;
    bool trusted, sends_again;           /* it knows the Redis that holds what is recorded; it has something to send */

    me = _pid + 1;
again: true;
    {
        d_step {
            holder = (holder == me -> NOBODY : holder);      /* its old session ends, if it has not */
            session[me] = false;
            mine = 0; my_history = 0; my_run = 0; my_beat = 0; told = 0; as_seen = 0; lost = 0; batch = 0; expected = 0;
            trusted = false; sends_again = false
        }
end_standby:
        atomic { holder == NOBODY -> holder = me; session[me] = true }
        atomic {                                             /* one UPDATE; past what Redis has heard of */
            STATEMENT;
            epoch = (epoch > marker -> epoch : marker) + 1; mine = epoch;
            my_history = history; my_run = runs; my_beat = beat; told = (beat > 0 -> beat - 1 : 0);
#ifdef NO_RUN
            trusted = known;
#else
            trusted = (known && s_run == runs);
#endif
            expected = known_marker
        }
greet: true;
        atomic { as_seen = r_history }
        atomic {                                             /* claim.lua, of what is taken for known */
            if
            :: marker > mine -> goto again
            :: trusted && marker == expected && r_history == my_history && SAME_RUN_AS_KNOWN && SAME_BEAT ->
                marker = mine; r_beat = my_beat; expected = mine; told = my_beat
            :: else -> trusted = false; sends_again = true
            fi
        }
        if
        :: trusted
        :: else ->
            atomic {
                STATEMENT;
                if
                :: epoch == mine ->
                    begun++; assert(begun < HISTORIES); history = begun; my_history = begun; s_run = my_run; known = false
                :: else -> goto again
                fi
            }
            atomic {                                         /* claim.lua, over the history that was seen */
                if
                :: marker > mine -> goto again
                :: marker <= mine && r_history != as_seen -> goto greet
                :: else -> marker = mine; r_history = my_history; r_run = my_run; r_beat = my_beat; told = my_beat
                fi
            }
#ifndef NO_DROP
            atomic { if :: MAY_DROP -> forget_queues() :: else -> goto greet fi }
#endif
#ifdef KNOWN_BEFORE_SENT_AGAIN
            atomic { STATEMENT; if :: epoch == mine -> known = true; known_marker = mine :: else -> goto again fi }
#endif
            trusted = true; expected = mine
        fi;
        if
        :: sends_again ->
            atomic { STATEMENT; lost = recorded & ~done & events }
            if :: lost != 0 -> publish(lost); lost = 0 :: else fi
        :: else
        fi;
        atomic {
            STATEMENT;
            if :: epoch == mine -> known = true; known_marker = mine; sends_again = false :: else -> goto again fi
        }
end_lead:
        do
        :: (events & ~recorded) != 0 ->
            atomic { STATEMENT; batch = events & ~recorded }
            publish(batch);
            atomic { STATEMENT; if :: epoch == mine -> recorded = recorded | batch; batch = 0 :: else -> goto again fi }
#ifndef NO_BEAT
        :: beat < 2 && beat == r_beat ->
            atomic { STATEMENT; if :: epoch == mine -> beat = my_beat + 1; my_beat = beat :: else -> goto again fi }
            atomic {                                         /* beat.lua: its own number, which is not asked again */
                if
                :: marker == mine && r_history == my_history && SAME_BEAT -> r_beat = my_beat; told = my_beat
                :: else -> goto greet
                fi
            }
#endif
        :: marker < mine || r_history != my_history -> goto greet     /* once a second it looks */
        :: marker > mine -> goto again
        :: !session[me] -> goto again                        /* and says something to Postgres */
        od
    } unless { killed[me] };
    killed[me] = false;
    goto again
}

active proctype writer() {
    do
    :: born < EVENTS -> atomic { born++; events = events | (1 << born) }
    :: else -> break
    od
}

byte hand, hand_history;                 /* what the consumer has in hand; nothing is an event of no bit */
bool committed;

#define OF(h)  queued[h] != 0 -> hand = queued[h] & -queued[h]; hand_history = h

active proctype consumer() {
end: do
    :: atomic { hand == 0 && (queued[0] | queued[1] | queued[2] | queued[3] | queued[4] | queued[5]) != 0 ->
           if :: OF(0) :: OF(1) :: OF(2) :: OF(3) :: OF(4) :: OF(5) fi; committed = false }
    :: atomic { hand != 0 && !committed ->                   /* one transaction */
           if
           :: ACTS -> assert((hand & events) != 0); done = done | hand
           :: else
           fi;
           committed = true }
       /* As late as you like. The message is there until then, and another one of the same id is the same one. */
    :: atomic { committed -> queued[hand_history] = queued[hand_history] & ~hand; hand = 0; hand_history = 0; committed = false }
    od
}

active proctype trouble() {
    byte backs = BACKS, deaths = DEATHS, flushes = FLUSHES;
    do
    :: atomic { backs > 0 && !has_backup -> has_backup = true;
           b_events = events; b_recorded = recorded; b_done = done; b_epoch = epoch; b_history = history; b_beat = beat;
           b_known = known; b_marker = known_marker; b_run = s_run }
    :: atomic { backs > 0 && has_backup && MAY_GO_BACK -> backs--; has_backup = false;
           events = b_events; recorded = b_recorded; done = b_done; epoch = b_epoch; history = b_history; beat = b_beat;
           known = b_known; known_marker = b_marker; s_run = b_run;
           b_events = 0; b_recorded = 0; b_done = 0; b_epoch = 0; b_history = 0; b_beat = 0; b_marker = 0; b_run = 0;
           b_known = false; session[1] = false; session[2] = false; holder = NOBODY;
#ifndef SAME_RUN
           runs++
#endif
       }
    :: deaths > 0 -> deaths--; if :: killed[1] = true :: killed[2] = true fi
    :: atomic { flushes > 0 -> flushes--; marker = 0; r_history = 0; r_run = 0; r_beat = 0; forget_queues() }
    :: break
    od
}

/* When nothing can go on, every event that Postgres has is done. */
active proctype judge() {
    timeout -> assert((events & ~done) == 0)
}
