/*
 * Parked requests as Python sees them. A front end parks a request that it cannot finish by itself, because a map or a
 * reservation is missing or because the host's disk must be waited for. Threads of the owner take parked requests,
 * serve them, and resume or complete them.
 *
 * A front end has three functions for this: `next_parked` waits for requests, `resume_parked` tries a read or write
 * again, `complete` answers.
 */
#ifndef TAPFS_SERVING_H
#define TAPFS_SERVING_H

#include "engine/engine.h"

/* cffi: begin */

/* The queue of a parked request. MOVES are reads and writes that lack a map. WRITES lack places, and one reservation is
 * made for many of them. SYNCS make what was written durable. OTHERS may take long (seeks, zeros, discards), and no SYNC
 * waits behind one. */
enum { TAPFS_MOVES = 0, TAPFS_OTHERS = 1, TAPFS_SYNCS = 2, TAPFS_WRITES = 3 };

/* So many requests are taken at once, at most. */
#define TAPFS_PARKED_AT_ONCE 64

typedef struct {
    uint64_t ticket;
    uint64_t offset; /* of the disk; READ and WRITE: where the request stands now */
    uint64_t length; /* what is left of the request */
    const uint8_t *data; /* WRITE: `length` bytes that nobody changes, valid until the ticket is completed */
    uint32_t request;    /* what it wants, in the constants of its front end */
    uint32_t reserved;
    uint64_t tried; /* READ and WRITE: when the try began that ended so, or earlier, in ns of the monotonic clock */
    tapfs_outcome outcome; /* READ and WRITE: MISS, RESERVE or FAILED */
} tapfs_parked;

/* cffi: end */

#endif
