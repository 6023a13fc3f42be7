/*
 * The workload of both frontends of the ring benchmark: their requests, the check of the data, the report.
 * Every 4 KiB block of the disk begins with its own number, which a write leaves as it is.
 */
#ifndef TAPFS_BENCH_WORKLOAD_H
#define TAPFS_BENCH_WORKLOAD_H

#include <errno.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define BLOCK 4096u

#define REQUIRE(condition) ((condition) ? (void)0 : die(#condition, __LINE__))

static void die(const char *what, int line)
{
    fprintf(stderr, "line %d: %s (errno %d)\n", line, what, errno);
    exit(1);
}

struct workload {
    uint64_t disk_blocks;
    uint32_t request_blocks;
    uint32_t depth;
    bool random, writing;
    double seconds;
    pid_t backend;

    uint64_t next, seed;
    double start, end; /* of what is measured */
    uint64_t requests, requests_at_start;
    double cpu_at_start;
    bool started;
};

static inline double now(clockid_t clock)
{
    struct timespec time;

    REQUIRE(clock_gettime(clock, &time) == 0);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

static inline double backend_cpu(const struct workload *work)
{
    clockid_t clock;

    REQUIRE(clock_getcpuclockid(work->backend, &clock) == 0);
    return now(clock);
}

/* PATTERN is randread, randwrite, read or write. */
static inline void workload_read(struct workload *work, char **arguments)
{
    const char *pattern = arguments[0];

    memset(work, 0, sizeof *work);
    work->random = strncmp(pattern, "rand", 4) == 0;
    work->writing = strstr(pattern, "write") != NULL;
    work->request_blocks = (uint32_t)atoi(arguments[1]) / BLOCK;
    work->depth = (uint32_t)atoi(arguments[2]);
    work->seconds = atof(arguments[3]);
    work->disk_blocks = strtoull(arguments[4], NULL, 10) / BLOCK;
    work->backend = (pid_t)atoi(arguments[5]);
    work->seed = 2006;
    work->start = now(CLOCK_MONOTONIC) + 0.5; /* what is before does not count: caches and grants get warm */
    work->end = work->start + work->seconds;
    REQUIRE(work->request_blocks > 0 && work->disk_blocks >= work->request_blocks);
}

/* The first block of the next request. */
static inline uint64_t workload_next(struct workload *work)
{
    uint64_t places = work->disk_blocks / work->request_blocks;
    uint64_t place = work->next++;

    if (work->random) {
        work->seed ^= work->seed << 13;
        work->seed ^= work->seed >> 7;
        work->seed ^= work->seed << 17;
        place = work->seed;
    }
    return place % places * work->request_blocks;
}

static inline void stamp(uint8_t *data, uint64_t block)
{
    memcpy(data, &block, sizeof block);
}

static inline void check_stamp(const uint8_t *data, uint64_t block)
{
    REQUIRE(memcmp(data, &block, sizeof block) == 0);
}

/* After each batch: whether to go on. */
static inline bool workload_goes_on(struct workload *work, uint64_t completed)
{
    double time = now(CLOCK_MONOTONIC);

    work->requests += completed;
    if (!work->started && time >= work->start) {
        work->started = true;
        work->start = time;
        work->cpu_at_start = backend_cpu(work);
        work->requests_at_start = work->requests;
        work->end = time + work->seconds;
    }
    if (time < work->end) {
        return true;
    }
    double cpu = backend_cpu(work) - work->cpu_at_start;
    uint64_t requests = work->requests - work->requests_at_start;
    printf("{\"requests\": %" PRIu64 ", \"seconds\": %.6f, \"backend_cpu_seconds\": %.6f, \"bytes\": %" PRIu64 "}\n",
           requests, time - work->start, cpu, requests * work->request_blocks * BLOCK);
    fflush(stdout);
    return false;
}

#endif
