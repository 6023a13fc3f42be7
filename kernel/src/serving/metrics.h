/*
 * Metrics of a front end: counters and a histogram of latencies for each kind of request. A front end notes when a
 * request begins and counts it when it is answered. Any thread may call any of these functions.
 */
#ifndef TAPFS_METRICS_H
#define TAPFS_METRICS_H

#include <stdatomic.h>

#include "common.h"

/* cffi: begin */

/* The kinds of requests. FLUSH makes what was written durable; OTHER asks for block status, seeks and the like. */
enum {
    TAPFS_METRIC_READ = 0,
    TAPFS_METRIC_WRITE = 1,
    TAPFS_METRIC_FLUSH = 2,
    TAPFS_METRIC_ZERO = 3,
    TAPFS_METRIC_DISCARD = 4,
    TAPFS_METRIC_OTHER = 5
};
#define TAPFS_METRIC_KINDS 6
/* Bucket i of a histogram counts latencies below 2^(8+i) nanoseconds and not below the one before, the last all others. */
#define TAPFS_METRIC_BUCKETS 30
#define TAPFS_METRIC_FIRST_BITS 8

/* Requests of a kind that were answered, with whatever answer. */
typedef struct {
    uint64_t errors;
    uint64_t bytes; /* of reads and writes that succeeded */
    uint64_t nanoseconds; /* the sum of the latencies */
    uint64_t buckets[TAPFS_METRIC_BUCKETS];
} tapfs_metric;

typedef struct tapfs_metrics tapfs_metrics;

void tapfs_metrics_read(const tapfs_metrics *metrics, uint32_t kind, tapfs_metric *metric);

/* cffi: end */

/* Threads count in parts of their own, as far as there are enough, so that they do not wait for each other's cache lines. */
#define METRICS_PARTS 8u

struct metrics_part {
    struct {
        _Atomic uint64_t errors, bytes, nanoseconds, buckets[TAPFS_METRIC_BUCKETS];
    } kinds[TAPFS_METRIC_KINDS];
    uint64_t unused[8];
};

/* All zeros at first. A part of its front end's server. */
struct tapfs_metrics {
    struct metrics_part parts[METRICS_PARTS];
};

/* A request begins; the time, for metrics_end. */
TAPFS_INTERNAL uint64_t metrics_begin(uint32_t kind, uint64_t offset, uint64_t length);
/* The request that began at a time is answered; `bytes`: of a read or write. */
TAPFS_INTERNAL void metrics_end(tapfs_metrics *metrics, uint32_t kind, uint64_t begun, uint64_t bytes, bool failed);

#endif
