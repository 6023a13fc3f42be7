/*
 * Types and functions that the files of the vhost-user device share. vhost/vhost.h is the interface,
 * kernel/src/vhost/CONCURRENCY.md has the rules of the threads, docs/specs/vhost-user.md the protocols.
 */
#ifndef TAPFS_VHOST_INTERNAL_H
#define TAPFS_VHOST_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>

#include "mover/mover.h"
#include "serving/metrics.h"
#include "serving/park.h"
#include "serving/rate_limit.h"
#include "vhost/vhost.h"

#define SECTOR_BYTES 512u

/* ---- bounds: what a guest can make the device hold or do */

/* A longer read or write is done in pieces of so many bytes. */
#define PIECE_BYTES MOVE_BYTES_MAX
/* The longest read or write. */
#define REQUEST_BYTES_MAX (64u << 20)
/* Descriptors of a request, and pieces of the guest's memory that they name. */
#define DESCRIPTORS_MAX 1024u
#define PARTS_MAX 2048u
/* Bytes that a ring's parked writes may have in memory of ours; a write that finds no room waits. */
#define GATHERED_BYTES_MAX (16u << 20)
/* Answers are not kept back for longer than it takes to do so many requests. */
#define BATCH_REQUESTS 16u

/* ---- virtio 1.2: 5.2.6 Device Operation, 2.7 Split Virtqueues */

enum { TYPE_IN = 0, TYPE_OUT = 1, TYPE_FLUSH = 4, TYPE_GET_ID = 8, TYPE_DISCARD = 11, TYPE_WRITE_ZEROES = 13 };
enum { STATUS_OK = 0, STATUS_IOERR = 1, STATUS_UNSUPPORTED = 2 };
#define HEADER_BYTES 16u
#define ZEROES_UNMAP 1u

struct vring_descriptor {
    uint64_t address;
    uint32_t length;
    uint16_t flags, next;
};
enum { DESCRIPTOR_NEXT = 1, DESCRIPTOR_WRITE = 2, DESCRIPTOR_INDIRECT = 4 };

struct vring_used_entry {
    uint32_t id, length;
};

/* ---- vhost/guard.c: memory that may vanish */

/*
 * From now on a part of this memory that its file does not have any more is no end of the process: all of the memory is
 * replaced by zeros of ours, and `gone` is set. `memory` was mapped from a file. False: too much is guarded.
 */
TAPFS_INTERNAL bool vhost_guard(void *memory, size_t length, atomic_bool *gone);
/* Before it is unmapped. */
TAPFS_INTERNAL void vhost_unguard(void *memory);

/* ---- vhost/memory.c: the guest's memory */

struct vhost_region {
    tapfs_vhost_region told;
    uint8_t *memory; /* where it begins */
    void *mapping;
    size_t mapped;
};

struct vhost_memory {
    struct vhost_region regions[TAPFS_VHOST_REGIONS_MAX];
    uint32_t count;
    atomic_bool gone; /* a file of it became shorter */
};

/*
 * Where an address of the guest lies here. `length` becomes what is left of the region, if that is less. `hint` is the
 * region where the last one was found, of the caller's. NULL: nowhere.
 */
TAPFS_INTERNAL uint8_t *vhost_guest_memory(const struct vhost_memory *memory, uint64_t address, uint64_t *length,
                                           uint32_t *hint);
/* Where [address, address + length) of the front end lies; NULL: not in one region, or not aligned. */
TAPFS_INTERNAL void *vhost_user_memory(const struct vhost_memory *memory, uint64_t address, uint64_t length,
                                       size_t alignment);
/* A file, or a part of one, mapped shared; the pages around it, too. 0 or an errno. */
TAPFS_INTERNAL int vhost_map(int fd, uint64_t offset, uint64_t size, struct vhost_region *region, atomic_bool *gone);
TAPFS_INTERNAL void vhost_unmap(struct vhost_region *region);

/* ---- vhost/inflight.c: requests that were taken and not answered, in memory that the front end keeps */

struct vhost_tracked;
struct vhost_track {
    struct vhost_tracked *states; /* NULL: nothing is tracked */
    uint32_t entries;
    uint64_t counter;
};

/*
 * Begin with a ring's part of the region, which has `room` for the states of so many entries. Which heads a predecessor had
 * taken, in their order, goes into `heads` (room for `entries`), and their number to `count`. `used_index` is what the ring
 * says. 0 or an errno.
 */
TAPFS_INTERNAL int vhost_track_open(struct vhost_track *track, uint8_t *memory, uint32_t room, uint32_t entries,
                                    uint16_t used_index, uint16_t *heads, uint32_t *count);
TAPFS_INTERNAL void vhost_track_taken(struct vhost_track *track, uint16_t head);
/* Its answer stands in the used ring, and is not published yet. */
TAPFS_INTERNAL void vhost_track_answered(struct vhost_track *track, uint16_t head);
/* The answers of these heads, the last ones that were answered, were published by this index. */
TAPFS_INTERNAL void vhost_track_published(struct vhost_track *track, const uint16_t *heads, uint32_t count,
                                          uint16_t used_index);
TAPFS_INTERNAL uint64_t vhost_track_bytes(uint32_t entries);

/* ---- vhost/ring.c: a split virtqueue, as memory */

struct vhost_vring {
    const struct vring_descriptor *descriptors;
    const uint16_t *available; /* flags, index, the entries, used_event */
    uint16_t *used;            /* flags, index */
    struct vring_used_entry *used_entries;
    uint16_t *available_event;
    uint32_t entries;
    bool event_index;
    uint16_t taken;     /* the next index that is taken */
    uint16_t answered;  /* the next index of the used ring that is written */
    uint16_t published; /* what the used ring's index says */
    bool notified;      /* the guest has been notified once */
};

/* False: a part of it does not lie in the guest's memory, or it is no power of two. */
TAPFS_INTERNAL bool vhost_vring_open(struct vhost_vring *vring, const struct vhost_memory *memory,
                                     const tapfs_vhost_ring *ring);
/* How many requests wait to be taken. More than `entries`: the guest has broken its ring. */
TAPFS_INTERNAL uint32_t vhost_vring_waiting(const struct vhost_vring *vring);
/* The head of the next one, which counts as taken from now on; any number is possible. */
TAPFS_INTERNAL uint16_t vhost_vring_take(struct vhost_vring *vring);
/* Ask the guest for a notification when it adds something. */
TAPFS_INTERNAL void vhost_vring_ask(struct vhost_vring *vring);
/* Ask for none: we look anyway. */
TAPFS_INTERNAL void vhost_vring_ask_not(struct vhost_vring *vring);
/* Bytes of the used ring. */
TAPFS_INTERNAL uint64_t vhost_vring_used_bytes(const struct vhost_vring *vring);
TAPFS_INTERNAL void vhost_vring_answer(struct vhost_vring *vring, uint16_t head, uint32_t written);
/* Show the guest the answers; whether it wants to be notified. */
TAPFS_INTERNAL bool vhost_vring_publish(struct vhost_vring *vring);

/* ---- requests */

struct vhost_queue;

/* Bytes [offset, offset + length) of the disk, and what is to become of them. */
struct vhost_range {
    uint64_t offset, length;
    uint32_t kind;
};

/* A request of the guest: there is one for each head, and it belongs to one thread at a time. */
struct vhost_request {
    struct parked_entry entry; /* first: the park knows a request by it */
    struct vhost_request *next;
    struct vhost_queue *queue;
    uint16_t head;
    bool busy;
    bool goes_on;     /* given back to be tried again */
    bool left;        /* given back, and not to be done by this device */
    bool syncing;     /* it is written, and made durable now */
    uint8_t status;
    uint32_t type;    /* the guest's word for it */
    uint32_t kind;    /* TAPFS_VHOST_READ, ...: what is being done */
    int error;        /* it is given back with this */
    uint32_t written; /* bytes in the guest's memory */
    uint8_t *status_at;

    uint64_t since;          /* when it was begun, as metrics_begin has it */
    uint64_t tried;          /* when it was begun, or was begun again */
    uint64_t offset, length; /* READ, WRITE: bytes of the disk */
    uint64_t done;           /* of them, in pieces that have ended */
    struct iovec *parts;     /* of the guest's memory: what is left, from `part` on */
    uint32_t part, part_count, part_room;
    struct iovec rest; /* of the last part of this piece, for the next one; no bytes: none */
    uint32_t piece_parts;
    struct move move; /* this piece */
    struct iovec gathered; /* a WRITE that is parked has its bytes in memory of ours */

    struct vhost_range *ranges; /* of zeroings and discards */
    uint32_t range, range_count;
};

/* ---- vhost/decode.c: the bytes of requests */

enum vhost_decoded { DECODED, DECODED_NONSENSE, DECODED_NO_MEMORY };

/*
 * What the chain of descriptors at `request->head` asks for, each descriptor read once. DECODED: it is checked, and
 * `status` is STATUS_OK, or the answer. NONSENSE: it cannot even be answered.
 */
TAPFS_INTERNAL enum vhost_decoded vhost_decode(struct vhost_queue *queue, struct vhost_request *request);

/* ---- vhost/requests.c */

/* Do a request that was decoded. */
TAPFS_INTERNAL void vhost_request_begin(struct vhost_request *request);
/* What the mover has ended, and what the owner's threads have given back. */
TAPFS_INTERNAL void vhost_requests_moved(struct vhost_queue *queue);
TAPFS_INTERNAL void vhost_requests_returned(struct vhost_queue *queue);
/* Give a request back to its queue. From any thread. */
TAPFS_INTERNAL void vhost_request_return(struct vhost_request *request);

/* ---- the things */

struct vhost_counters {
    _Atomic uint64_t reads, writes, flushes, zeroes, discards, read_bytes, written_bytes, errors, parked, waited,
        notifications, kicks, redone, throttled_ns;
};

/* A virtqueue that is served, and its thread. */
struct vhost_queue {
    tapfs_vhost *device;
    pthread_t thread;
    int epoll_fd, wake_fd, kick_fd, error_fd;
    bool indirect, write_through;
    bool logs, logs_ring;  /* what it writes into the guest's memory, and into its used ring */
    uint64_t ring_address; /* of the used ring, in the guest */
    struct vhost_vring vring;
    struct vhost_track track;
    struct mover *mover;
    struct vhost_request *requests; /* one for each entry */
    uint16_t *batch;                /* heads that were answered and are not published */
    uint32_t batched;
    uint32_t in_flight;
    uint32_t region; /* where the last address was found */
    struct vring_descriptor *table; /* a table of indirect descriptors, copied */
    struct iovec *readable, *writable;
    uint16_t *left; /* heads that a predecessor had taken */
    uint32_t left_count;
    size_t gathered; /* bytes */
    struct vhost_request *gathering, **gathering_end; /* parked writes that wait for memory */
    uint32_t index;
    atomic_bool stopping;
    bool drains; /* while it stops: nothing is left in the in-flight region */

    pthread_mutex_t call_lock; /* of call_fd */
    int call_fd;
    pthread_mutex_t returned_lock; /* of `returned` */
    struct vhost_request *returned;
};

struct tapfs_vhost {
    tapfs_disk *disk;
    uint64_t size;
    bool writable;
    bool stopped;
    char id[TAPFS_VHOST_ID_BYTES];
    int problem_fd;
    struct park park;
    struct rate_limit limit;
    struct vhost_memory memory;
    struct vhost_region inflight; /* no memory: there is none */
    uint32_t inflight_rings, inflight_entries;
    struct vhost_region log; /* of pages that are written; no memory: there is none */
    uint64_t log_bytes;
    struct vhost_queue *queues[TAPFS_VHOST_RINGS_MAX]; /* those that are started */
    _Atomic(const char *) problems[TAPFS_VHOST_RINGS_MAX];
    struct vhost_counters counters;
    tapfs_metrics metrics;
};

static inline void vhost_count(_Atomic uint64_t *counter, uint64_t amount)
{
    atomic_fetch_add_explicit(counter, amount, memory_order_relaxed);
}

/* ---- vhost/log.c: pages that the device writes, where the ring logs them */

/* So many bytes of the guest's memory, in one region, were written. */
TAPFS_INTERNAL void vhost_log_memory(struct vhost_queue *queue, const void *memory, uint64_t length);
/* The memory of this piece of a READ was written, or a part of it. Of other requests: nothing. */
TAPFS_INTERNAL void vhost_log_read(struct vhost_request *request);
/* The used ring was written. */
TAPFS_INTERNAL void vhost_log_ring(struct vhost_queue *queue);

/* ---- vhost/answers.c */

/* Answer a request, which is free for the next one then. */
TAPFS_INTERNAL void vhost_queue_answer(struct vhost_request *request);
/* The kind of a request in the words of metrics. */
TAPFS_INTERNAL uint32_t vhost_metric_of(uint32_t type);
/* Free a request that has no answer. */
TAPFS_INTERNAL void vhost_queue_forget(struct vhost_request *request);
/* Show the guest what was answered. */
TAPFS_INTERNAL void vhost_queue_publish(struct vhost_queue *queue);
TAPFS_INTERNAL void vhost_queue_notify(struct vhost_queue *queue);
/* The guest has broken the protocol: nothing more is taken. A static string. */
TAPFS_INTERNAL void vhost_queue_fail(struct vhost_queue *queue, const char *problem);

/* ---- vhost/queue.c: its thread */

TAPFS_INTERNAL void *vhost_queue_serve(void *queue);

/* ---- vhost/queue_life.c */

/* A queue whose thread runs; NULL with an errno in `error`. */
TAPFS_INTERNAL struct vhost_queue *vhost_queue_new(tapfs_vhost *device, uint32_t index, const tapfs_vhost_ring *ring,
                                                   int *error);
TAPFS_INTERNAL int vhost_queue_set_call(struct vhost_queue *queue, int call);
/* Wait until nothing of it is in flight, and free it. The next index that would be taken. With `drains` nothing is left in
 * the in-flight region: what would be is answered with an error. */
TAPFS_INTERNAL uint16_t vhost_queue_end(struct vhost_queue *queue, bool drains);

#endif
