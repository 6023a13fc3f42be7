/*
 * The park of a front end: queues of requests that wait for the owner's threads, and the requests that those threads
 * have taken, by ticket. serving/ knows no front end.
 *
 * A request belongs to one thread at a time: to its front end until park_put, to the park until park_next, then to the
 * thread that took it until park_taken removes it. Any thread may call any of these functions.
 */
#ifndef TAPFS_PARK_H
#define TAPFS_PARK_H

#include <pthread.h>

#include "common.h"
#include "serving/serving.h"

#define PARK_QUEUES 4u

/* The first member of a request that can be parked. The park writes it, nobody else. */
struct parked_entry {
    struct parked_entry *next;
    uint64_t ticket; /* of the last time that it was taken */
};

struct park_queue {
    struct parked_entry *first, *last;
    pthread_cond_t filled;
};

struct park {
    pthread_mutex_t lock; /* of everything here; held for linking and unlinking only */
    struct park_queue queues[PARK_QUEUES];
    struct parked_entry *taken;
    uint64_t last_ticket;
    bool stopped;
};

TAPFS_INTERNAL void park_init(struct park *park);
/* Nobody uses the park any more. */
TAPFS_INTERNAL void park_destroy(struct park *park);
/* Put a request at the end of a queue. False: the park is stopped, and the request stays the caller's. */
TAPFS_INTERNAL bool park_put(struct park *park, uint32_t queue, struct parked_entry *entry);
/* Wait for a request of a queue, and take up to `capacity` that wait by then, in their order and each under a new ticket.
 * How many; 0: the park is stopped. An unknown queue is TAPFS_OTHERS. */
TAPFS_INTERNAL size_t park_next(struct park *park, uint32_t queue, struct parked_entry **entries, size_t capacity);
/* What a front end's `next_parked` does: take requests as park_next, and `describe` each for Python. */
TAPFS_INTERNAL size_t park_next_described(struct park *park, uint32_t queue, tapfs_parked *parked, size_t capacity,
                                          void (*describe)(const struct parked_entry *entry, tapfs_parked *parked));
/* The request that was taken under a ticket; NULL: there is none. With `remove` it leaves the park. */
TAPFS_INTERNAL struct parked_entry *park_taken(struct park *park, uint64_t ticket, bool remove);
/* Call `visit` with every request that waits or was taken. Under the lock: it only looks and marks. */
TAPFS_INTERNAL void park_each(struct park *park, void (*visit)(struct parked_entry *entry, void *argument),
                              void *argument);
/* Refuse requests from now on and wake every thread that waits. The requests that nobody has taken come back as a list
 * in their order, those of TAPFS_MOVES first. What is taken stays taken. */
TAPFS_INTERNAL struct parked_entry *park_stop(struct park *park);

#endif
