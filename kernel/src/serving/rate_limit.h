/*
 * The rate limit of a disk: bytes and requests per second, for all threads that serve it. Any thread may call any of
 * these functions.
 */
#ifndef TAPFS_RATE_LIMIT_H
#define TAPFS_RATE_LIMIT_H

#include <pthread.h>
#include <stdatomic.h>

#include "common.h"

struct rate_limit {
    pthread_mutex_t mutex;
    atomic_bool limited;
    uint64_t bytes_per_second, requests_per_second;
    uint64_t bytes_due, requests_due; /* when what was taken is paid for, in ns of the monotonic clock */
};

TAPFS_INTERNAL uint64_t rate_limit_now(void);
TAPFS_INTERNAL void rate_limit_init(struct rate_limit *limit);
TAPFS_INTERNAL void rate_limit_destroy(struct rate_limit *limit);
TAPFS_INTERNAL void rate_limit_set(struct rate_limit *limit, uint64_t bytes, uint64_t requests);
/* Nanoseconds until a request may be taken; 0: now. */
TAPFS_INTERNAL uint64_t rate_limit_delay(struct rate_limit *limit);
/* A request of so many bytes has been taken. */
TAPFS_INTERNAL void rate_limit_charge(struct rate_limit *limit, uint64_t bytes);

#endif
