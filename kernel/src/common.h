/*
 * Sizes and arithmetic that every folder of kernel/src uses. This file includes nothing of ours, so that every folder
 * may include it.
 */
#ifndef TAPFS_COMMON_H
#define TAPFS_COMMON_H

#include <stdbool.h>
#include <stdint.h>

#define TAPFS_INTERNAL __attribute__((visibility("hidden")))

/* What O_DIRECT demands of most hosts, of memory and of offsets; a host may demand more (host_file.direct_block). */
#define DIRECT_ALIGNMENT 4096u
/* Bounce buffers and streamed fills. */
#define CHUNK_BYTES (256u << 10)

static inline uint64_t minimum(uint64_t left, uint64_t right)
{
    return left < right ? left : right;
}

static inline uint64_t maximum(uint64_t left, uint64_t right)
{
    return left > right ? left : right;
}

static inline uint64_t round_down(uint64_t value, uint64_t multiple)
{
    return value - value % multiple;
}

/* The caller knows that the result does not wrap: host and guest offsets end at INT64_MAX. */
static inline uint64_t round_up(uint64_t value, uint64_t multiple)
{
    return round_down(value + multiple - 1, multiple);
}

/* Whether [offset, offset + length) is a range of a host file: it ends at or before INT64_MAX. */
static inline bool in_host_range(uint64_t offset, uint64_t length)
{
    return offset <= INT64_MAX && length <= (uint64_t)INT64_MAX - offset;
}

#endif
