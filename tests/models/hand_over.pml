/* How relays take turns: the end of DESIGN section 4, and section 7 where the relay or Redis breaks.
 *
 * Two relays want one session lock. Whoever has it raises the epoch, greets Redis, and then reads, sends and
 * records in turn. Anything may happen to it between any two of its steps: it is killed and started again; it
 * is frozen as long as you like (nothing makes a process go on); its session ends, and it hears of that with
 * its next statement; or the lock alone is gone and it hears nothing, which Postgres does not do but a proxy
 * or an operator might. Redis is flushed, or restarts without some of what it was given last.
 *
 * In the code:  workers/relay/{relay,leading,history}.py, workers/lua/{claim,publish}.lua.
 * Checked:      tests/models/test_models.py, which also breaks each assumption by its -D name.
 * Not in here:  a Postgres that forgets its last records (history.pml: there everything in it goes back to an earlier
 *               state at once), positions out of order (reading.pml), bundles, retries, what a consumer does to act once.
 */

#define EVENTS  2
#ifndef THEFTS
#define DEATHS   1                       /* how often each kind of trouble comes */
#define CUTS     1
#define THEFTS   1
#define FLUSHES  1
#define RESTARTS 1
#endif

#define NOBODY  0
#define UPTO(position)  ((1 << ((position) + 1)) - 2)    /* the set of events 1 to this */

/* Postgres */
byte committed;                          /* events 1 to this are there to be read */
byte epoch, checkpoint, recorded;        /* relay_state, published_batches */
byte known_id, known_marker;             /* the Redis that holds what was recorded: its run id, the epoch in it */
byte done;                               /* processed_events */
byte holder = NOBODY;                    /* of the leader's lock */

/* Redis */
byte run_id = 1, marker, queued;
byte claimed;                            /* the newest epoch that it was told of, unless it forgot */

/* The two relays, 1 and 2 */
bool killed[3], session[3];

#ifdef LOSS_ONLY
#define PROMISE(what)  skip
#else
#define PROMISE(what)  assert(what)
#endif
#ifdef RECORD_UNFENCED
#define FENCED  true
#else
#define FENCED  (epoch == mine)
#endif

/* Is this the Redis that holds what was recorded? */
#ifdef MARKER_NOT_COMPARED
#define AS_KNOWN  (found_id == known)
#else
#define AS_KNOWN  (found_id == known && marker == expected)
#endif

#define STATEMENT  if :: !session[me] -> goto again :: else fi    /* the session may have ended */

/* claim.lua, for a Redis that lost what it knew: the marker becomes ours, unless a newer relay was here. */
inline claim() {
    atomic {
        if
        :: marker > mine -> goto again
        :: else -> marker = mine; claimed = (claimed > mine -> claimed : mine)
        fi
    }
}

/* One call of publish.lua. What is queued keeps its place: a set is what the NX makes of it. */
inline publish(events) {
    atomic {
        if
#ifndef MARKER_UNSEEN
        :: marker < mine -> goto greet                   /* Redis lost */
#endif
#ifndef PUBLISH_UNFENCED
        :: marker > mine -> goto again
#endif
        :: else ->
            PROMISE(mine >= claimed);                    /* an older epoch never publishes */
            queued = queued | (events)
        fi
    }
}

inline record() {
    atomic {
        STATEMENT;
        if
        :: FENCED ->
            PROMISE(epoch == mine);                      /* an older epoch never records */
            recorded = recorded | (UPTO(upto) & ~UPTO(from));
            checkpoint = (upto > checkpoint -> upto : checkpoint)
        :: else -> goto again
        fi
    }
}

active [2] proctype relay() {
    byte me, mine, from, upto, lost;
    byte known, expected, found_id;                      /* the Redis it takes for the one that knows */
    bool trusted;

    me = _pid + 1;
again: true;
    {
        d_step {
            holder = (holder == me -> NOBODY : holder);  /* its old session ends, if it has not */
            session[me] = false;
            mine = 0; from = 0; upto = 0; known = 0; expected = 0; found_id = 0; lost = 0; trusted = false
        }
end_standby:
        atomic { holder == NOBODY -> holder = me; session[me] = true }
        atomic {                                         /* one UPDATE */
            STATEMENT;
            epoch = (epoch > marker -> epoch : marker) + 1; mine = epoch; from = checkpoint; upto = from; known = known_id; expected = known_marker
        }
greet: true;
        found_id = run_id;
        atomic {                                         /* one call of claim.lua */
            if
            :: marker > mine -> goto again
            :: AS_KNOWN -> marker = mine; claimed = (claimed > mine -> claimed : mine); trusted = true
            :: else -> trusted = false
            fi
        }
        if
        :: trusted
        :: else ->
            atomic { STATEMENT; if :: FENCED -> known_id = 0; known = 0 :: else -> goto again fi }
            claim();
#ifdef KNOWN_BEFORE_SENT_AGAIN
            atomic { STATEMENT; if :: FENCED -> known_id = found_id; known_marker = mine :: else -> goto again fi }
#endif
            atomic { STATEMENT; lost = recorded & ~done & UPTO(upto) }
            if
            :: lost != 0 -> publish(lost); lost = 0
            :: else
            fi
        fi;
        atomic {
            STATEMENT;
            if
            :: FENCED -> known_id = found_id; known_marker = mine
            :: else -> goto again
            fi;
            known = found_id; expected = mine; found_id = 0; trusted = false
        }
end_lead:
        do
        :: from == upto && committed > from -> atomic { STATEMENT; upto = committed }
#ifdef RECORDED_BEFORE_SENT
        :: from < upto -> record(); publish(UPTO(upto) & ~UPTO(from)); from = upto
#else
        :: from < upto -> publish(UPTO(upto) & ~UPTO(from)); record(); from = upto
#endif
#ifdef MARKER_UNSEEN
        :: run_id != known -> goto greet
#else
        :: run_id != known || marker < mine -> goto greet     /* once a second it looks */
#endif
        od
    } unless { killed[me] };
    killed[me] = false;
    goto again
}

active proctype writer() {
    do
    :: committed < EVENTS -> committed++
    :: else -> break
    od
}

active proctype consumer() {
    byte taken;
end: do
    :: atomic { queued != 0 -> taken = queued & -queued };           /* the first of them */
       atomic { done = done | taken; queued = queued & ~taken; taken = 0 }
    od
}

active proctype trouble() {
    byte deaths = DEATHS, cuts = CUTS, thefts = THEFTS, flushes = FLUSHES, restarts = RESTARTS;
    do
    :: deaths > 0 -> deaths--; if :: killed[1] = true :: killed[2] = true fi
    :: atomic { cuts > 0 && holder != NOBODY -> cuts--; session[holder] = false; holder = NOBODY }
    :: atomic { thefts > 0 && holder != NOBODY -> thefts--; holder = NOBODY }
    :: atomic { flushes > 0 -> flushes--; marker = 0; claimed = 0; queued = 0 }
    :: atomic { restarts > 0 -> restarts--; run_id++;
           if
           :: queued = 0
           :: queued = queued & (queued - 1)             /* the last one written is not on the disk */
           fi;
           if
           :: true
           :: marker = (marker > 0 -> marker - 1 : 0); claimed = marker
           fi
       }
    :: break
    od
}

/* When nothing can go on, everything is done. */
active proctype judge() {
    timeout -> assert(done == UPTO(committed) && committed == EVENTS)
}
