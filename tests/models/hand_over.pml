/* How relays take turns, where they, Redis and Postgres break: the end of DESIGN section 4, and section 7.
 *
 * Two relays want one session lock. The holder raises the epoch, verifies Redis, and then reads, sends and
 * records in turn. Anything may happen to it between any two of its steps: it is killed and started again; it
 * is frozen as long as you like (nothing makes a process go on); its session ends, and it hears of that with
 * its next statement; or the lock alone is gone and it hears nothing, which Postgres does not do but a proxy
 * or an operator might. Redis is flushed, or restarts without some of what it was given last. Postgres forgets
 * its last records, any number of them: a restored backup, a failover to a standby that lagged, a crash with
 * asynchronous commits. All sessions end with that, and the server is another run; with SAME_RUN it seems to be
 * the same one, as when a machine goes back with its memory, and then only the heartbeat shows it.
 *
 * In the code:  dovecote/relay/{relay,leader,history}.py, dovecote/broker/lua/{claim,drop,heartbeat,publish}.lua,
 *               dovecote/consumer/consumer.py.
 * Checked:      tests/models/test_models.py, which also breaks each assumption by its -D name.
 * Not in here:  positions out of order (reading.pml), bundles, retries, how a consumer acts once, two databases on
 *               one Redis, and a Redis that goes back to the history before: it comes back with the last or none.
 */

#ifndef EVENTS
#define EVENTS  2                        /* as many positions; no more than 2 */
#endif
#ifndef THEFTS
#define DEATHS   1                       /* how often each kind of trouble comes */
#define CUTS     1
#define THEFTS   1
#define FLUSHES  1
#define RESTARTS 1
#define REWINDS  0
#endif
#define WRITTEN  (EVENTS + REWINDS)      /* what is forgotten leaves its position to another event */

#define NOBODY  0
#define UPTO(position)  ((1 << ((position) + 1)) - 2)    /* the set of positions 1 to this */
/* A set of events, each with a bit of its own for ever, from a set of positions */
#define AT(positions)  ((((positions) & 2) -> 1 << event[1] : 0) | (((positions) & 4) -> 1 << event[2] : 0))

/* Postgres: all of this may go back to what it was, at once */
byte committed;                          /* events at the positions 1 to this are there to be read */
byte event[3];                           /* which event that is */
byte epoch, checkpoint, recorded;        /* relay_state, published_batches: positions */
byte known_id, known_fence;             /* the Redis that holds what was recorded: its run id, the epoch in it */
byte history, known_run;                 /* in which history it holds it, and which run of Postgres wrote it */
byte done;                               /* processed_events: events */
byte heartbeat;
/* What it was once */
bool has_copy;
byte old_committed, old_event[3], old_epoch, old_checkpoint, old_recorded, old_known_id, old_known_fence;
byte old_history, old_known_run, old_done, old_heartbeat;

/* Around Postgres */
byte server = 1;                            /* which run of it this is */
byte written;                            /* events that were ever committed */
byte histories;                          /* that were ever begun: each has a name of its own */
byte holder = NOBODY;                    /* of the leader's lock */

/* Redis. Messages are events; of the history it is in, or of an older one, which have other ids. */
byte run_id = 1, fence, queued, outdated;
byte redis_history, redis_run, redis_heartbeat;
byte in_this_run;                        /* events of which a message names this run of Postgres as that of its relay */
byte claimed;                            /* the newest epoch that it was given, unless it lost it */

byte hand;                               /* what a consumer has in hand, and which the id of it is */
bool hand_outdated;

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

/* Is this the Redis that holds what was recorded, and Postgres the one that recorded it? */
#ifdef FENCE_NOT_COMPARED
#define SAME_FENCE  true
#else
#define SAME_FENCE  (fence == expected && redis_history == my_history && redis_run == my_run)
#endif
#ifdef RUN_NOT_COMPARED
#undef SAME_FENCE
#define SAME_FENCE  (fence == expected && redis_history == my_history)
#define SAME_SERVER  true
#else
#define SAME_SERVER  same_run
#endif
#ifdef HEARTBEAT_NOT_COMPARED
#define SAME_HEARTBEAT  true
#else
#define SAME_HEARTBEAT  (redis_heartbeat <= my_heartbeat && redis_heartbeat + 1 >= my_heartbeat)
#endif
#define AS_KNOWN  (found_id == known && SAME_FENCE && SAME_SERVER && SAME_HEARTBEAT)

#ifdef SAME_RUN
#define BY_A_HEARTBEAT  && redis_heartbeat > old_heartbeat              /* it goes back to before a heartbeat that Redis has */
#else
#define BY_A_HEARTBEAT
#endif

#define STATEMENT  if :: !session[me] -> goto again :: else fi    /* the session may have ended */

inline set_fence() {
    fence = mine; claimed = (claimed > mine -> claimed : mine);
    redis_history = my_history; redis_run = my_run; redis_heartbeat = my_heartbeat
}

/* claim.lua, where something was lost: fence and history become ours, unless another relay was here. */
inline claim() {
    atomic {
        if
        :: fence > mine || redis_history != seen -> goto verify_redis
        :: else ->
            set_fence();
#ifndef IDS_NOT_SALTED
            outdated = outdated | queued; queued = 0; hand_outdated = (hand != 0);
#endif
            seen = 0
        fi
    }
}

/* drop.lua: what is in flight stays there. */
inline drop() {
    atomic {
        if
        :: fence != mine -> goto verify_redis
#ifndef DROP_UNFENCED
        :: fence == mine && redis_history != my_history -> goto verify_redis
#endif
        :: else ->
#ifdef IDS_NOT_SALTED
            queued = queued & hand
#else
            queued = (hand_outdated -> 0 : queued & hand); outdated = 0
#endif
        fi
    }
}

/* One call of publish.lua. What is queued keeps its place: a set is what the NX makes of it. */
inline publish(events) {
    atomic {
        if
#ifndef FENCE_UNSEEN
        :: fence < mine || redis_history != my_history -> goto verify_redis     /* Redis lost */
#endif
#ifndef PUBLISH_UNFENCED
        :: fence > mine -> goto again
#endif
        :: else ->
            PROMISE(mine >= claimed);                    /* an older epoch never publishes */
            queued = queued | (events);
            in_this_run = (my_run == server -> in_this_run | (events) : in_this_run)
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
    byte me, mine, from, upto, batch, lost;
    byte known, expected, found_id;                      /* the Redis it takes for the one that knows */
    byte my_history, my_run, my_heartbeat, seen;
    bool same_run, trusted;

    me = _pid + 1;
again: true;
    {
        d_step {
            holder = (holder == me -> NOBODY : holder);  /* its old session ends, if it has not */
            session[me] = false;
            mine = 0; from = 0; upto = 0; batch = 0; known = 0; expected = 0; found_id = 0; lost = 0; trusted = false;
            my_history = 0; my_run = 0; my_heartbeat = 0; seen = 0; same_run = false
        }
end_standby:
        atomic { holder == NOBODY -> holder = me; session[me] = true; my_run = server }
        seen = fence;
        atomic {                                         /* one UPDATE */
            STATEMENT;
            epoch = (epoch > seen -> epoch : seen) + 1; mine = epoch; seen = 0;
            from = checkpoint; upto = from; known = known_id; expected = known_fence;
            my_history = history; same_run = (known_run == my_run); my_heartbeat = heartbeat
        }
verify_redis: true;
        d_step { found_id = run_id; seen = redis_history; lost = 0 }
        atomic {                                         /* one call of claim.lua */
            if
            :: fence > mine -> goto again
            :: AS_KNOWN -> set_fence(); trusted = true
            :: else -> trusted = false
            fi
        }
        if
        :: trusted
        :: else ->
            atomic {
                STATEMENT;
                if
                :: FENCED -> known_id = 0; known = 0; histories++; my_history = histories; history = my_history; known_run = my_run; same_run = true
                :: else -> goto again
                fi
            }
            claim();
            drop();
#ifdef KNOWN_BEFORE_SENT_AGAIN
            atomic { STATEMENT; if :: FENCED -> known_id = found_id; known_fence = mine :: else -> goto again fi }
#endif
            atomic { STATEMENT; lost = AT(recorded & UPTO(upto)) & ~done }
            if
            :: lost != 0 -> publish(lost); lost = 0
            :: else
            fi
        fi;
        atomic {
            STATEMENT;
            if
            :: FENCED -> known_id = found_id; known_fence = mine
            :: else -> goto again
            fi;
            known = found_id; expected = mine; found_id = 0; trusted = false; seen = 0
        }
end_lead:
        do
        :: from == upto && committed > from -> atomic { STATEMENT; upto = committed; batch = AT(UPTO(upto) & ~UPTO(from)) }
#ifdef RECORDED_BEFORE_SENT
        :: from < upto -> record(); publish(batch); from = upto; batch = 0
#else
        :: from < upto -> publish(batch); record(); from = upto; batch = 0
#endif
#ifdef FENCE_UNSEEN
        :: run_id != known -> goto verify_redis
#else
        :: run_id != known || fence < mine || redis_history != my_history -> goto verify_redis     /* once a second it looks */
#endif
        :: fence > mine || !session[me] -> goto again
#ifdef SAME_RUN
        :: my_heartbeat < 2 && queued != 0 -> atomic { STATEMENT; if :: FENCED -> my_heartbeat++; heartbeat = my_heartbeat :: else -> goto again fi };
            atomic { if :: fence == mine && redis_history == my_history && redis_heartbeat <= my_heartbeat -> redis_heartbeat = my_heartbeat :: else -> goto verify_redis fi }
#endif
        od
    } unless { killed[me] };
    killed[me] = false;
    goto again
}

active proctype writer() {
end: do
    :: atomic { committed < EVENTS && written < WRITTEN -> committed++; event[committed] = written; written++ }
    od
}

active proctype consumer() {
end: do
    :: atomic { hand == 0 && queued != 0 -> hand = queued & -queued; hand_outdated = false }        /* the first of them */
#ifndef IDS_NOT_SALTED
    :: atomic { hand == 0 && outdated != 0 -> hand = outdated & -outdated; hand_outdated = true }
#endif
    :: atomic { hand != 0 ->                             /* its transaction; a message that names this run needs no look */
           if
#ifndef NOT_LOOKED_UP
           :: (hand & (in_this_run | AT(UPTO(committed)))) == 0
#endif
           :: else -> PROMISE((hand & AT(UPTO(committed))) != 0); done = done | hand
           fi
       };
       /* as late as you like */
       atomic {
           if
           :: hand_outdated -> outdated = outdated & ~hand
           :: else -> queued = queued & ~hand
           fi;
           hand = 0; hand_outdated = false
       }
    od
}

active proctype trouble() {
    byte deaths = DEATHS, cuts = CUTS, thefts = THEFTS, flushes = FLUSHES, restarts = RESTARTS, rewinds = REWINDS;
    do
    :: deaths > 0 -> deaths--; if :: killed[1] = true :: killed[2] = true fi
    :: atomic { cuts > 0 && holder != NOBODY -> cuts--; session[holder] = false; holder = NOBODY }
    :: atomic { thefts > 0 && holder != NOBODY -> thefts--; holder = NOBODY }
    :: atomic { flushes > 0 -> flushes--; fence = 0; claimed = 0; queued = 0; outdated = 0; redis_history = 0; redis_run = 0; redis_heartbeat = 0 }
    :: atomic { restarts > 0 -> restarts--; run_id++;
           if
           :: queued = 0
           :: queued = queued & (queued - 1)             /* the last one written is not on the disk */
           fi;
           if
           :: true
           :: fence = (fence > 0 -> fence - 1 : 0); claimed = fence; redis_history = 0
           fi
       }
    :: d_step { rewinds > 0 && !has_copy -> has_copy = true;
           old_committed = committed; old_event[1] = event[1]; old_event[2] = event[2]; old_done = done; old_heartbeat = heartbeat;
           old_epoch = epoch; old_checkpoint = checkpoint; old_recorded = recorded;
           old_known_id = known_id; old_known_fence = known_fence; old_history = history; old_known_run = known_run
       }
    :: d_step { has_copy BY_A_HEARTBEAT -> has_copy = false; rewinds--;
           committed = old_committed; event[1] = old_event[1]; event[2] = old_event[2]; done = old_done; heartbeat = old_heartbeat;
           epoch = old_epoch; checkpoint = old_checkpoint; recorded = old_recorded;
           known_id = old_known_id; known_fence = old_known_fence; history = old_history; known_run = old_known_run;
           old_committed = 0; old_event[1] = 0; old_event[2] = 0; old_done = 0; old_heartbeat = 0;
           old_epoch = 0; old_checkpoint = 0; old_recorded = 0;
           old_known_id = 0; old_known_fence = 0; old_history = 0; old_known_run = 0;
           session[1] = false; session[2] = false; holder = NOBODY
#ifndef SAME_RUN
           ; server++; in_this_run = 0
#endif
       }
    :: break
    od
}

/* When nothing can go on, everything that Postgres knows is done. */
active proctype judge() {
    timeout -> assert((AT(UPTO(committed)) & ~done) == 0 && (committed == EVENTS || written == WRITTEN))
}
