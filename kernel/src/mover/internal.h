/*
 * Types and functions that the files of the mover share. mover.h is the interface.
 * kernel/src/mover/CONCURRENCY.md has the rules.
 */
#ifndef TAPFS_MOVER_INTERNAL_H
#define TAPFS_MOVER_INTERNAL_H

#include "mover/mover.h"

/* ---- mover/locate.c: where a range of the disk lies on the host */

/* Runs that are on their way for one move at a time. */
#define ROUTE_RUNS 16u

struct run {
    uint64_t offset, length; /* of the disk */
    uint64_t host_offset;
    struct host_file *file; /* NULL: zeros */
    uint32_t layer, file_index;
};

struct route {
    struct run runs[ROUTE_RUNS]; /* ascending and contiguous */
    uint32_t count;
    /* What comes after the runs: DONE (the end, or more of the same), MISS, RESERVE, or something that only the
     * engine's own functions can move or refuse. */
    bool by_engine;
    int32_t stop;
    uint32_t stop_layer;
    uint64_t stop_offset, stop_length;
};

/* The caller runs a request on the disk until its runs are moved. */
TAPFS_INTERNAL void locate(tapfs_disk *disk, bool writing, uint64_t offset, uint64_t length, struct route *route);

/* ---- mover/uring.c: the rings of io_uring, for reads and writes. Of one thread. */

struct io_uring_sqe;
struct io_uring_cqe;

struct uring {
    int fd; /* -1: there is none */
    uint32_t in_flight; /* queued, or with the kernel */

    /* the queue of submissions: we move its tail, the kernel its head */
    uint32_t *submit_head, *submit_tail, *submit_flags;
    uint32_t submit_mask, submit_entries;
    uint32_t queued_tail; /* up to here entries are filled */
    struct io_uring_sqe *entries;

    /* the queue of completions: the kernel moves its tail, we its head */
    uint32_t *complete_head, *complete_tail;
    uint32_t complete_mask, complete_entries;
    struct io_uring_cqe *completions;

    void *rings;
    size_t rings_bytes, entries_bytes;
};

/* False: the kernel has none for us, and none of the other functions does anything. */
TAPFS_INTERNAL bool uring_open(struct uring *uring, uint32_t entries);
/* Nothing may be with the kernel. */
TAPFS_INTERNAL void uring_close(struct uring *uring);
/* One read or write of a file. */
struct uring_transfer {
    int fd;
    bool writing;
    bool by_thread; /* a thread of the kernel does it: the submission itself would wait for this host */
    const struct iovec *vector; /* stays untouched until the completion */
    uint32_t count;
    uint64_t offset;
};

/* False: no room. */
TAPFS_INTERNAL bool uring_queue(struct uring *uring, const struct uring_transfer *transfer, uint64_t tag);
/* Whether uring_queue has no room before a submission. */
TAPFS_INTERNAL bool uring_is_full(const struct uring *uring);
/* Hand the kernel what is queued. False: it has not taken all. */
TAPFS_INTERNAL bool uring_submit(struct uring *uring);
/* Take the last entry back that the kernel has not taken. False: there is none. */
TAPFS_INTERNAL bool uring_take_back(struct uring *uring, uint64_t *tag);
/* The next completion: bytes or a negated errno. False: none is there now. */
TAPFS_INTERNAL bool uring_next(struct uring *uring, uint64_t *tag, int32_t *result);

/* ---- mover/workers.c: threads that call move_now */

struct workers {
    pthread_mutex_t mutex;
    pthread_cond_t filled;
    tapfs_disk *disk;
    struct move *first, *last; /* to do */
    struct move *ended, *ended_last;
    atomic_bool any_ended;
    bool stopping;
    int event_fd; /* readable while `ended` is not empty */
    pthread_t *threads;
    uint32_t count, limit; /* those that there are, and may be */
    uint32_t idle;         /* those that wait for something to do */
    uint32_t queued;       /* moves in the list `first` */
};

/* Starts one thread, and up to `limit` of them as moves wait for one. 0 or an errno. */
TAPFS_INTERNAL int workers_start(struct workers *workers, tapfs_disk *disk, uint32_t limit);
/* There must be nothing to do. */
TAPFS_INTERNAL void workers_stop(struct workers *workers);
TAPFS_INTERNAL void workers_set_disk(struct workers *workers, tapfs_disk *disk);
TAPFS_INTERNAL void workers_add(struct workers *workers, struct move *move);
/* Put a move that has ended elsewhere to those that the workers have ended. */
TAPFS_INTERNAL void workers_report(struct workers *workers, struct move *move);
/* The moves that have ended, in order, NULL if none. */
TAPFS_INTERNAL struct move *workers_ended(struct workers *workers);

/* ---- mover/run_io.c: one run of a move between its parts and the host */

enum {
    RUN_IO_WAITING,
    RUN_IO_MOVED,
    RUN_IO_FAILED,
    RUN_IO_REFUSED /* what is left of it is for the engine's own functions */
};

struct run_io {
    struct iovec *slices; /* what is left of the parts' bytes */
    uint32_t slice_count;
    uint64_t moved;
    int state, error;
    bool locked;
    struct range_holder blocks;
};

/* A move that its owner's thread has in hand. */
struct flight {
    struct flight *next; /* idle ones */
    struct request request;
    struct move *move;
    uint64_t start, end; /* of the disk: where this began, where the move ends */
    uint32_t index;
    uint32_t begun;   /* runs of the route that were given to the host */
    uint32_t pending; /* those that are there */
    /* The byte of the disk that the next slice is for, and its place in the parts. */
    uint64_t cursor;
    uint32_t part;
    uint64_t part_inner;
    uint32_t slices_used;
    struct route route;
    struct run_io ios[ROUTE_RUNS];
    struct iovec slices[MOVE_PARTS_MAX + ROUTE_RUNS];
};

/* Stand at the start of the route. */
TAPFS_INTERNAL void run_ios_begin(struct flight *flight);
/* Take the next run in hand, in order. */
TAPFS_INTERNAL void run_io_prepare(struct flight *flight, uint32_t index);
/* Move of a prepared run what the host gives or takes without waiting. The state then: MOVED, FAILED, or WAITING. */
TAPFS_INTERNAL int run_io_at_once(struct flight *flight, uint32_t index);
/* Give what is left of a run to the ring. False: not possible. */
TAPFS_INTERNAL bool run_io_queue(struct flight *flight, uint32_t index, struct uring *uring, uint64_t tag);
/* What the ring made of it; true: the run is over, false: it goes on in the ring. */
TAPFS_INTERNAL bool run_io_complete(struct flight *flight, uint32_t index, int32_t result, struct uring *uring,
                                    uint64_t tag);
/* The run is not with the host any more. */
TAPFS_INTERNAL void run_io_end(struct flight *flight, uint32_t index, int state);

#endif
