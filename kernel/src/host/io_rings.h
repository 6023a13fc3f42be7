/*
 * The queues of io_uring by its system calls: entries for submission, completions, and the call that hands over and
 * waits. What an entry asks for is its owner's. One ring belongs to one thread.
 */
#ifndef TAPFS_IO_RINGS_H
#define TAPFS_IO_RINGS_H

#include <stddef.h>

#include "common.h"

struct io_uring_cqe;

struct io_rings {
    int fd; /* -1: there is none */
    uint32_t in_flight; /* queued, or with the kernel */

    /* the queue of submissions: we move its tail, the kernel its head */
    uint32_t *submit_head, *submit_tail, *submit_flags;
    uint32_t submit_mask, submit_entries;
    uint32_t queued_tail; /* up to here entries are filled */
    uint8_t *entries;
    size_t entry_bytes;

    /* the queue of completions: the kernel moves its tail, we its head */
    uint32_t *complete_head, *complete_tail;
    uint32_t complete_mask, complete_entries;
    struct io_uring_cqe *completions;

    void *rings;
    size_t rings_bytes, entries_bytes;
};

/* What a ring may ever be used for, whoever fills its entries: io_uring passes the filters of system calls by. */
struct io_rings_use {
    const uint8_t *operations; /* IORING_OP_… */
    const uint8_t *registers; /* IORING_REGISTER_… */
    uint8_t operation_count, register_count;
    uint8_t entry_flags; /* IOSQE_… that entries may have */
};

/* Flags of io_uring_setup(2). Linux before 5.10 does not limit the use. False with errno set: the kernel has none for us. */
TAPFS_INTERNAL bool io_rings_open(struct io_rings *rings, uint32_t entries, uint32_t flags, const struct io_rings_use *use);
/* Nothing may be with the kernel, or it is cancelled. */
TAPFS_INTERNAL void io_rings_close(struct io_rings *rings);
/* Whether io_rings_entry has no room before a submission. */
TAPFS_INTERNAL bool io_rings_full(const struct io_rings *rings);
/* The next entry, of zeros, which is queued by this; NULL: no room. As many are in flight as there are places for
 * completions, so none is ever lost. An entry that completes more than once is not counted so. */
TAPFS_INTERNAL void *io_rings_entry(struct io_rings *rings);
/* Hand the kernel what is queued. False: it has not taken all. */
TAPFS_INTERNAL bool io_rings_submit(struct io_rings *rings);
/* The same, and wait until a completion is there, a signal comes, or the time is over (0: without end). 0 or an errno,
 * of which EINTR, ETIME, EBUSY and EAGAIN say that it may be called again. Linux 5.11. */
TAPFS_INTERNAL int io_rings_wait(struct io_rings *rings, uint64_t nanoseconds);
/* Take the last entry back that the kernel has not taken: its memory. NULL: there is none. */
TAPFS_INTERNAL const void *io_rings_take_back(struct io_rings *rings);
/* The next completion: what it was tagged with, and a result or a negated errno. False: none is there now. */
TAPFS_INTERNAL bool io_rings_next(struct io_rings *rings, uint64_t *tag, int32_t *result);

#endif
