/*
 * Types and functions that the files of the mover share. mover.h is the interface.
 * kernel/src/mover/CONCURRENCY.md has the rules.
 */
#ifndef TAPFS_MOVER_INTERNAL_H
#define TAPFS_MOVER_INTERNAL_H

#include "host/io_rings.h"
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

/* ---- mover/uring.c: reads and writes of files by io_uring (host/io_rings.h) */

/* False: the kernel has none for us, and no function of its rings does anything. */
TAPFS_INTERNAL bool uring_open(struct io_rings *rings, uint32_t entries);
/* Memory that the kernel keeps at hand for direct transfers: found and pinned once, not for each of them. */
struct uring_memory {
    uint8_t *start;
    size_t bytes;
    enum { MEMORY_OFFERED, MEMORY_REGISTERED, MEMORY_REFUSED } state;
};

/* One read or write of a file. */
struct uring_transfer {
    int fd;
    bool writing;
    bool by_thread; /* a thread of the kernel does it: the submission itself would wait for this host */
    bool direct;    /* the host's device reads or writes the memory itself */
    const struct iovec *vector; /* stays untouched until the completion */
    uint32_t count;
    uint64_t offset;
};

/* Whether a transfer may name its memory by the registration, which its first such transfer makes. */
TAPFS_INTERNAL bool uring_registered(const struct io_rings *rings, struct uring_memory *memory,
                                     const struct uring_transfer *transfer);
/* `registered`: the vector has one part, in registered memory. False: no room. */
TAPFS_INTERNAL bool uring_queue(struct io_rings *rings, const struct uring_transfer *transfer, bool registered,
                                uint64_t tag);
/* Take the last entry back that the kernel has not taken. False: there is none. */
TAPFS_INTERNAL bool uring_take_back(struct io_rings *rings, uint64_t *tag);

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
/* Whether a prepared run is better left to io_uring, which reads what the host has in memory in the submission itself. */
TAPFS_INTERNAL bool run_io_may_be_queued_first(const struct flight *flight, uint32_t index, const struct io_rings *rings);
/* Take the only run of a route in hand for a ring of the owner's. False: it is for others. */
TAPFS_INTERNAL bool run_io_claim(struct flight *flight);
/* Move of a prepared run what the host gives or takes without waiting. The state then: MOVED, FAILED, or WAITING. */
TAPFS_INTERNAL int run_io_at_once(struct flight *flight, uint32_t index);
/* Give what is left of a run to the ring. False: not possible. */
TAPFS_INTERNAL bool run_io_queue(struct flight *flight, uint32_t index, struct io_rings *rings,
                                 struct uring_memory *memory, uint64_t tag);
/* What the ring made of it; true: the run is over, false: it goes on in the ring. */
TAPFS_INTERNAL bool run_io_complete(struct flight *flight, uint32_t index, int32_t result, struct io_rings *rings,
                                    struct uring_memory *memory, uint64_t tag);
/* The run is not with the host any more. */
TAPFS_INTERNAL void run_io_end(struct flight *flight, uint32_t index, int state);

#endif
