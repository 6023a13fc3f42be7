/*
 * Types and functions that the files of the ublk server share. ublk/ublk.h is the interface.
 * kernel/src/ublk/CONCURRENCY.md has the rules of the threads.
 */
#ifndef TAPFS_UBLK_INTERNAL_H
#define TAPFS_UBLK_INTERNAL_H

#include <errno.h>
#include <pthread.h>

#include "host/io_rings.h"
#include "mover/mover.h"
#include "serving/metrics.h"
#include "serving/park.h"
#include "serving/rate_limit.h"
#include "ublk/ublk.h"

#define QUEUES_MAX 64u
#define DEPTH_MAX 4096u
#define SECTOR_BYTES 512u

/* ---- the kernel's interface: docs/specs/ublk.md, "Requests" */

enum { OPERATION_READ = 0, OPERATION_WRITE = 1, OPERATION_FLUSH = 2, OPERATION_DISCARD = 3, OPERATION_WRITE_ZEROES = 5 };
#define OPERATION_MASK 0xffu
#define FLAG_FUA (UINT32_C(1) << 13)
#define FLAG_NO_UNMAP (UINT32_C(1) << 15)
#define FLAG_NOT_IN_RING (UINT32_C(1) << 17) /* the ring has no number for the request's pages */

/* What the driver says of a request. It stands in memory that the driver shares with us. */
struct ublk_descriptor {
    uint32_t operation; /* and flags */
    uint32_t sectors;
    uint64_t first_sector;
    uint64_t address; /* of the data, ours */
};

/* ---- the things */

struct ublk_queue;

/* A request of the driver, one for each tag of a queue. It belongs to the thread of its queue, and while it is parked to
 * the park and to the thread that has taken it. */
struct ublk_request {
    struct parked_entry entry; /* first: the park knows a request by it */
    struct ublk_request *next; /* of a list */
    struct ublk_queue *queue;
    uint16_t tag;
    bool gone;           /* the driver gives no request under this tag any more */
    uint32_t operation;  /* OPERATION_... */
    uint32_t kind;       /* what is being done for it: TAPFS_UBLK_... */
    bool durable, synced; /* FUA; the SYNC for it has begun */
    bool passed;         /* moved without its data having been here */
    bool goes_on;        /* given back to be moved by the mover */
    int error;           /* given back with this, if it does not go on */
    uint64_t since; /* when it was begun, as metrics_begin has it */
    uint64_t tried; /* when it was begun, or was begun again */
    uint64_t offset, length, done;
    tapfs_disk *disk;
    uint8_t *data;
    struct iovec whole; /* the data that is left, for `move` */
    struct move move;
    tapfs_outcome outcome;
};

struct ublk_list {
    struct ublk_request *first, *last;
};

static inline void ublk_append(struct ublk_list *list, struct ublk_request *request)
{
    request->next = NULL;
    if (list->last == NULL) {
        list->first = request;
    } else {
        list->last->next = request;
    }
    list->last = request;
}

static inline struct ublk_request *ublk_take_first(struct ublk_list *list)
{
    struct ublk_request *request = list->first;
    if (request != NULL) {
        list->first = request->next;
        if (list->first == NULL) {
            list->last = NULL;
        }
    }
    return request;
}

/* Written by the queue's thread alone. */
struct ublk_counters {
    _Atomic uint64_t operations[OPERATION_WRITE_ZEROES + 1];
    _Atomic uint64_t read_bytes, written_bytes, errors, parked, at_once, passed, batches, throttled_ns, in_flight;
};

/* The disk that is served. */
struct ublk_served {
    tapfs_disk *disk;
    uint64_t size;
    bool writable;
};

/* How a queue speaks with its driver. All but `open` and `close` are called between these two, all by the queue's thread. */
struct ublk_channel {
    /* Have the memory and the descriptors. 0 or an errno. */
    int (*open)(struct ublk_queue *queue);
    /* Let the driver have all tags. 0 or an errno. */
    int (*fetch)(struct ublk_queue *queue);
    /* Answer a request: 0 or more, or a negated errno. Its tag is the driver's then. */
    void (*commit)(struct ublk_request *request, int32_t result);
    /* With zero copy: have the ring move the pages of a request; `ublk_passed` takes what comes of it. False: no room. */
    bool (*pass)(struct ublk_request *request, const struct mover_pass *pass);
    /* With zero copy: copy the data of a write to its memory, or of a read from there. 0 or an errno. */
    int (*copy)(struct ublk_request *request);
    /* Wait until requests have come (into `queue->waiting`), `mover_fd` or `wake_fd` is readable, or the time is over
     * (0: without end). 0 or an errno after which the queue does not work. */
    int (*wait)(struct ublk_queue *queue, uint64_t nanoseconds);
    void (*close)(struct ublk_queue *queue);
};

struct ublk_queue {
    /* Constants, set before its thread starts. */
    tapfs_ublk *server;
    uint32_t number;
    int wake_fd;
    pthread_t thread;
    bool started;
    struct mover *mover;
    struct ublk_request *requests; /* one for each tag */

    /* Under the server's lock. */
    bool opened;          /* it can fetch, or `error` says why not */
    bool ready;           /* its tags are the driver's, or `error` says why not */
    int error;
    bool quiet;           /* paused, and nothing in flight */
    bool over;            /* it serves nothing any more */
    uint64_t generation;  /* of `served` */

    /* The thread's own. */
    struct ublk_served served;
    struct ublk_list waiting; /* fetched, and not begun */
    uint32_t in_flight;       /* begun, and not committed */
    uint32_t gone;            /* tags that the driver gives no request under any more */
    struct io_rings rings;
    const struct ublk_descriptor *descriptors;
    size_t descriptor_bytes;
    uint8_t *buffers;
    bool watching_mover, watching_wake;
    struct simulated_queue *simulated;
    struct ublk_counters counters;

    /* Other threads give requests back here. */
    pthread_mutex_t returned_lock;
    struct ublk_list returned;
};

struct tapfs_ublk {
    tapfs_ublk_options options;
    const struct ublk_channel *channel;
    struct ublk_queue *queues;
    struct rate_limit limit;
    struct park park;
    bool started, stopped;
    bool fetching; /* all queues may fetch, under the lock */
    int ended_fd;
    atomic_int problem;
    pthread_mutex_t lock;
    pthread_cond_t settled; /* a queue is ready, has become quiet, or has taken over what is served */
    struct ublk_served served;
    _Atomic uint64_t generation; /* of `served` */
    atomic_bool paused, stopping;
    tapfs_metrics metrics;
};

static inline void ublk_count(_Atomic uint64_t *counter, uint64_t amount)
{
    atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + amount, memory_order_relaxed);
}

/* ---- ublk/channel.c: the driver of the kernel; ublk/simulated.c: a test that plays it */

TAPFS_INTERNAL extern const struct ublk_channel ublk_driver;
TAPFS_INTERNAL extern const struct ublk_channel ublk_simulated;

/* ---- ublk/wake.c: for any thread */

TAPFS_INTERNAL void ublk_wake(const struct ublk_queue *queue);
/* The queue's thread has seen that it was woken. */
TAPFS_INTERNAL void ublk_awake(const struct ublk_queue *queue);
/* Give a request back to its queue's thread. */
TAPFS_INTERNAL void ublk_give_back(struct ublk_request *request, int error);

/* ---- ublk/parked.c */

/* Hand a request to the owner's threads. False: the server stops, and it stays the caller's. */
TAPFS_INTERNAL bool ublk_park(struct ublk_request *request);
/* What is parked and not taken is given back, and nothing is parked any more. */
TAPFS_INTERNAL void ublk_park_stop(tapfs_ublk *server);

/* ---- ublk/requests.c: by the queue's thread */

/* Have a request done that was fetched. */
TAPFS_INTERNAL void ublk_begin(struct ublk_request *request);
/* The ring has moved the pages of a request, or has not. */
TAPFS_INTERNAL void ublk_passed(struct ublk_request *request, int32_t result);
/* What the mover has ended. */
TAPFS_INTERNAL void ublk_moved(struct ublk_queue *queue);
/* What other threads have given back. */
TAPFS_INTERNAL void ublk_take_back(struct ublk_queue *queue);

/* ---- ublk/queue.c */

/* A queue's thread: serves it until the server stops or the driver ends it. */
TAPFS_INTERNAL void *ublk_queue_serve(void *queue);

#endif
