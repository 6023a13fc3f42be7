/* Counting of requests and of their latencies. */
#include <time.h>

#include "engine/probes.h"
#include "serving/metrics.h"

#define SECOND_NS 1000000000u

static uint64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * SECOND_NS + (uint64_t)time.tv_nsec;
}

/* The number of the calling thread among all that have counted. */
static uint32_t thread_number(void)
{
    static _Atomic uint32_t threads;
    static _Thread_local uint32_t number;

    if (number == 0) {
        number = atomic_fetch_add_explicit(&threads, 1, memory_order_relaxed) + 1;
    }
    return number;
}

static uint32_t bucket_of(uint64_t nanoseconds)
{
    uint64_t above = nanoseconds >> TAPFS_METRIC_FIRST_BITS;
    uint32_t bits = above == 0 ? 0 : 64 - (uint32_t)__builtin_clzll(above);
    return bits < TAPFS_METRIC_BUCKETS ? bits : TAPFS_METRIC_BUCKETS - 1;
}

uint64_t metrics_begin(uint32_t kind, uint64_t offset, uint64_t length)
{
    TAPFS_PROBE3(request__begin, kind, offset, length);
    return now();
}

static void add(_Atomic uint64_t *counter, uint64_t amount)
{
    atomic_fetch_add_explicit(counter, amount, memory_order_relaxed);
}

void metrics_end(tapfs_metrics *metrics, uint32_t kind, uint64_t begun, uint64_t bytes, bool failed)
{
    uint64_t took = now() - begun;
    struct metrics_part *part = &metrics->parts[thread_number() % METRICS_PARTS];

    TAPFS_PROBE4(request__end, kind, bytes, failed, took);
    add(&part->kinds[kind].buckets[bucket_of(took)], 1);
    add(&part->kinds[kind].nanoseconds, took);
    if (failed) {
        add(&part->kinds[kind].errors, 1);
    } else if (bytes > 0) {
        add(&part->kinds[kind].bytes, bytes);
    }
}

static uint64_t value(const _Atomic uint64_t *counter)
{
    return atomic_load_explicit(counter, memory_order_relaxed);
}

void tapfs_metrics_read(const tapfs_metrics *metrics, uint32_t kind, tapfs_metric *metric)
{
    *metric = (tapfs_metric){.errors = 0};
    for (uint32_t i = 0; kind < TAPFS_METRIC_KINDS && i < METRICS_PARTS; i++) {
        const struct metrics_part *part = &metrics->parts[i];
        metric->errors += value(&part->kinds[kind].errors);
        metric->bytes += value(&part->kinds[kind].bytes);
        metric->nanoseconds += value(&part->kinds[kind].nanoseconds);
        for (uint32_t j = 0; j < TAPFS_METRIC_BUCKETS; j++) {
            metric->buckets[j] += value(&part->kinds[kind].buckets[j]);
        }
    }
}
