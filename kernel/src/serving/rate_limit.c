/*
 * The rate limit. Each request that is taken costs time, by its bytes and by its number. The next request may be taken
 * when the time of all requests before it has passed. So a request of any size passes, and later ones wait the longer.
 */
#include <time.h>

#include "serving/rate_limit.h"

#define SECOND_NS 1000000000u
/* Time that was not used counts for so long. */
#define BURST_NS 50000000u

uint64_t rate_limit_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * SECOND_NS + (uint64_t)now.tv_nsec;
}

void rate_limit_init(struct rate_limit *limit)
{
    pthread_mutex_init(&limit->mutex, NULL);
    atomic_init(&limit->limited, false);
    limit->bytes_per_second = limit->requests_per_second = 0;
    limit->bytes_due = limit->requests_due = 0;
}

void rate_limit_destroy(struct rate_limit *limit)
{
    pthread_mutex_destroy(&limit->mutex);
}

void rate_limit_set(struct rate_limit *limit, uint64_t bytes, uint64_t requests)
{
    pthread_mutex_lock(&limit->mutex);
    limit->bytes_per_second = bytes;
    limit->requests_per_second = requests;
    limit->bytes_due = limit->requests_due = 0; /* debts of the old rate are forgiven */
    atomic_store(&limit->limited, bytes != 0 || requests != 0);
    pthread_mutex_unlock(&limit->mutex);
}

uint64_t rate_limit_delay(struct rate_limit *limit)
{
    if (!atomic_load_explicit(&limit->limited, memory_order_relaxed)) {
        return 0;
    }
    pthread_mutex_lock(&limit->mutex);
    uint64_t due = maximum(limit->bytes_due, limit->requests_due);
    pthread_mutex_unlock(&limit->mutex);
    uint64_t now = rate_limit_now();
    return due > now ? due - now : 0;
}

static void pay(uint64_t *due, uint64_t now, uint64_t amount, uint64_t per_second)
{
    if (per_second != 0) {
        /* A request has at most 2^26 bytes: this does not overflow. */
        *due = maximum(*due, now - minimum(now, BURST_NS)) + amount * SECOND_NS / per_second;
    }
}

void rate_limit_charge(struct rate_limit *limit, uint64_t bytes)
{
    if (!atomic_load_explicit(&limit->limited, memory_order_relaxed)) {
        return;
    }
    uint64_t now = rate_limit_now();
    pthread_mutex_lock(&limit->mutex);
    pay(&limit->bytes_due, now, bytes, limit->bytes_per_second);
    pay(&limit->requests_due, now, 1, limit->requests_per_second);
    pthread_mutex_unlock(&limit->mutex);
}
