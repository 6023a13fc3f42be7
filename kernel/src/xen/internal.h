/*
 * Types and functions that the files of the Xen rings share. xen.h is the interface.
 * kernel/src/xen/CONCURRENCY.md has the rules of the threads, kernel/src/xen/JOURNAL.md those of the journal. The protocol
 * is that of Xen's public headers io/blkif.h and io/ring.h.
 */
#ifndef TAPFS_XEN_INTERNAL_H
#define TAPFS_XEN_INTERNAL_H

#include "mover/mover.h"
#include "serving/metrics.h"
#include "serving/park.h"
#include "serving/rate_limit.h"
#include "xen/transport.h"
#include "xen/xen.h"

/* blkif.h: operations and the statuses of a response. */
#define OPERATION_READ 0u
#define OPERATION_WRITE 1u
#define OPERATION_BARRIER 2u
#define OPERATION_FLUSH 3u
#define OPERATION_DISCARD 5u
#define OPERATION_INDIRECT 6u
#define STATUS_OKAY 0
#define STATUS_ERROR (-1)
#define STATUS_UNSUPPORTED (-2)

#define SEGMENT_BYTES 8u
#define DIRECT_SEGMENTS 11u
/* They fit into one page of references, so only the first of a request's eight is ever wanted. */
#define INDIRECT_SEGMENTS_MAX 256u
#define REQUEST_BYTES_MAX 112u

#define RINGS_MAX 64u
#define RING_PAGES_MAX 16u
#define RING_ENTRIES_MAX 512u
/* The indices stand before the entries. */
#define RING_ENTRIES_AT 64u
/* Answers are not kept back for longer than it takes to move so many bytes. */
#define BATCH_BYTES (1u << 20)
/* Nor for more requests: the frontend takes the first answers, and asks anew, while the rest is done. */
#define BATCH_REQUESTS 16u
/* Memory of ours that requests of a ring pass through; a move that finds none waits. */
#define BUFFER_PAGES_MAX 2048u
/* How many of these pages may be pinned for direct transfers. */
#define REGISTERED_PAGES_MAX 512u
/* Pieces of one grant copy. */
#define PIECES_MAX 2048u
/* From here on a READ is copied out of the host's own memory where that is possible: it costs a system call or two. */
#define BORROWED_LEAST (16u << 10)
/* After so many in a row that failed it is not tried any more on the ring: each is read twice. */
#define BORROWED_FAILURES 8u
/* Pages that stay mapped for a ring. */
#define PERSISTENT_PAGES_MAX 16384u

struct xen_ring;

/* ---- xen/decode.c: the bytes of requests */

/* Where a protocol has its fields. */
struct xen_layout {
    uint32_t entry_bytes;
    uint32_t id, sector;
    uint32_t segments;      /* READ, WRITE, BARRIER, FLUSH */
    uint32_t sector_count;  /* DISCARD */
    uint32_t reference;     /* INDIRECT: the page of its segments */
};

/* What is served now. */
struct xen_served {
    tapfs_disk *disk;
    uint64_t sectors;
    bool writable, discard;
};

/* A piece of a page: 1 to 8 sectors. */
struct xen_segment {
    uint32_t reference;
    uint16_t offset, length; /* bytes within the page */
};

/* A request that was taken. Its number is that of its entry in the journal. */
struct xen_request {
    struct xen_request *next;
    uint64_t id, offset, length; /* bytes of the disk */
    uint64_t since; /* when it was taken, as metrics_begin has it */
    struct xen_segment *segments; /* room for the most that there may be */
    uint32_t segment_count;
    uint32_t reference; /* `indirect`: the page that has the segments */
    uint32_t number;
    bool indirect;
    uint8_t operation; /* what is done, and what the response names */
    int16_t status;    /* the response's */
};

TAPFS_INTERNAL const struct xen_layout *xen_layout(uint32_t protocol);
/*
 * What `bytes` ask for, checked; STATUS_OKAY, or the status to answer with. Of an indirect request the segments
 * are left to xen_decode_segments. The id and the operation are always set.
 */
TAPFS_INTERNAL int16_t xen_decode(const struct xen_layout *layout, const struct xen_served *served,
                                  uint32_t indirect_segments, const uint8_t *bytes, struct xen_request *request);
/* `segment_count` segments, and that they lie within the disk. */
TAPFS_INTERNAL int16_t xen_decode_segments(const struct xen_served *served, const uint8_t *bytes,
                                           struct xen_request *request);

/* ---- xen/journal.c: what was taken and not answered, in a file */

struct xen_journal_entry;

struct xen_journal {
    uint8_t *memory;
    size_t bytes;
};

/* Map the file and compare it with the rings: one that does not fit is made anew. 0 or an errno. */
TAPFS_INTERNAL int xen_journal_open(tapfs_xen *device);
TAPFS_INTERNAL void xen_journal_close(tapfs_xen *device);
/* Where a request's bytes go before anybody looks at them. */
TAPFS_INTERNAL uint8_t *xen_journal_bytes(struct xen_ring *ring, const struct xen_request *request);
/* The bytes are whole. */
TAPFS_INTERNAL void xen_journal_take(struct xen_ring *ring, const struct xen_request *request, uint32_t index);
/* Everything before `index` has been taken. */
TAPFS_INTERNAL void xen_journal_consumed(struct xen_ring *ring, uint32_t index);
/* The response stands in the ring at `index`. */
TAPFS_INTERNAL void xen_journal_answer(struct xen_ring *ring, const struct xen_request *request, uint32_t index);
/* The response has been published. */
TAPFS_INTERNAL void xen_journal_free(struct xen_ring *ring, const struct xen_request *request);
/*
 * Before the ring's thread starts: where the ring goes on, and which requests are to be done again, in their order.
 * False: ring and journal contradict each other.
 */
TAPFS_INTERNAL bool xen_journal_recover(struct xen_ring *ring);

/* ---- xen/buffer.c: memory of ours in pages, of one ring's thread */

struct xen_buffers {
    uint8_t *memory;
    uint32_t pages;
    bool returned; /* something has been given back since this was last cleared */
    uint64_t taken[BUFFER_PAGES_MAX / 64];
};

/* 0 or an errno. */
TAPFS_INTERNAL int xen_buffers_init(struct xen_buffers *buffers, uint32_t pages);
TAPFS_INTERNAL void xen_buffers_destroy(struct xen_buffers *buffers);
/* NULL: not now. */
TAPFS_INTERNAL uint8_t *xen_buffers_take(struct xen_buffers *buffers, uint64_t bytes);
TAPFS_INTERNAL void xen_buffers_return(struct xen_buffers *buffers, const uint8_t *buffer, uint64_t bytes);

/* ---- transfers: requests whose data is moved together */

/* Where the data of a transfer is. */
enum xen_memory { MEMORY_NONE, MEMORY_BUFFER, MEMORY_LENT, MEMORY_MAPPED, MEMORY_HELD };
/* A barrier waits until it is alone; then it is a SYNC, a WRITE and a SYNC. Other writes have a SYNC after them only
 * where their data would not outlive this process without one. */
enum xen_stage { STAGE_ONLY, STAGE_DRAIN, STAGE_SYNC_BEFORE, STAGE_WRITE, STAGE_SYNC_AFTER };

/* Requests that are done in one: reads or writes of contiguous sectors, or a single one of any kind. */
struct xen_transfer {
    struct parked_entry entry; /* first: the park knows a transfer by it */
    struct xen_transfer *next;
    struct xen_ring *ring;
    struct xen_request *first, *last;
    uint32_t request_count, segment_count;
    uint64_t offset, length;
    uint32_t kind; /* TAPFS_XEN_READ ... */
    enum xen_stage stage;

    enum xen_memory memory;
    bool by_buffer;       /* a copy out of the host's own memory has failed */
    uint8_t *buffer;      /* MEMORY_BUFFER; MEMORY_LENT: the host's, only to be read */
    uint64_t buffer_bytes;
    struct xen_mapping mapping; /* MEMORY_MAPPED */
    struct iovec *parts; /* MOVE_PARTS_MAX of them, where pages are mapped */
    struct iovec whole;  /* the buffer */
    struct move move;

    /* While it is parked it belongs to the park, then to the thread that took it. */
    tapfs_disk *disk;
    int error;
};

struct xen_transfers {
    struct xen_transfer *first, *last;
};

static inline void xen_append(struct xen_transfers *list, struct xen_transfer *transfer)
{
    transfer->next = NULL;
    *(list->first != NULL ? &list->last->next : &list->first) = transfer;
    list->last = transfer;
}

static inline struct xen_transfer *xen_pop(struct xen_transfers *list)
{
    struct xen_transfer *transfer = list->first;
    if (transfer != NULL) {
        list->first = transfer->next;
        transfer->next = NULL;
    }
    return transfer;
}

/* ---- xen/pages.c: the frontend's pages and memory of ours */

/* Give a transfer memory and set up its move. False: not now. */
TAPFS_INTERNAL bool xen_pages_acquire(struct xen_transfer *transfer);
/* Have the bytes of a large READ where the host has them; until xen_pages_give_back. False: they are to be read. */
TAPFS_INTERNAL bool xen_pages_borrow(struct xen_transfer *transfer);
/* `taken`: all of them have been copied. */
TAPFS_INTERNAL void xen_pages_give_back(struct xen_transfer *transfer, bool taken);
TAPFS_INTERNAL void xen_pages_release(struct xen_transfer *transfer);
/* Copy what a WRITE has left to do into a buffer, where the frontend cannot change it. False: not now. */
TAPFS_INTERNAL bool xen_pages_gather(struct xen_transfer *transfer);
/* Whether the pieces of one more transfer can be copied together with those that were added. */
TAPFS_INTERNAL bool xen_pieces_fit(const struct xen_transfer *transfer);
TAPFS_INTERNAL void xen_pieces_add(struct xen_transfer *transfer);
/* Copy what was added; requests that fail get their status. */
TAPFS_INTERNAL void xen_pieces_copy(struct xen_ring *ring, bool to_frontend);
/* Fetch and decode the segments of the indirect requests of the batch; those that fail get their status. */
TAPFS_INTERNAL void xen_fetch_segments(struct xen_ring *ring);

/* ---- xen/transfers.c */

/* One request on its own, or the first of several. */
TAPFS_INTERNAL struct xen_transfer *xen_transfer_new(struct xen_ring *ring, uint32_t kind, struct xen_request *request);
/* Add a read or write to what waits to be moved, together with those before it where that goes. */
TAPFS_INTERNAL void xen_move_add(struct xen_ring *ring, struct xen_request *request);
/* Nothing joins what has been added so far. */
TAPFS_INTERNAL void xen_move_seal(struct xen_ring *ring);
/* The mover has ended this, at once or later. */
TAPFS_INTERNAL void xen_move_ended(struct move *move);
/* Take over what the mover has ended since. */
TAPFS_INTERNAL void xen_move_take_over(struct xen_ring *ring);
/* A parked transfer has come back. */
TAPFS_INTERNAL void xen_move_returned(struct xen_transfer *transfer);
/* Do what can be done now; what ends is answered or parked. */
TAPFS_INTERNAL void xen_move_run(struct xen_ring *ring);

/* Have a SYNC made for a transfer, together with the others that want one. */
TAPFS_INTERNAL void xen_move_sync(struct xen_transfer *transfer, enum xen_stage stage);

/* ---- xen/parked.c */

/* The transfer comes back by xen_ring_return. A WRITE has its data in a buffer. */
TAPFS_INTERNAL void xen_park(struct xen_transfer *transfer);
/* What is parked and not taken comes back with EIO, and so does what is parked later. */
TAPFS_INTERNAL void xen_park_stop(struct park *park);

/* ---- xen/ring.c: one ring and its thread */

/* Written by the ring's thread alone. */
struct xen_counters {
    _Atomic uint64_t operations[OPERATION_DISCARD + 1];
    _Atomic uint64_t read_bytes, written_bytes, errors, merged, parked, at_once, borrowed, notifications, batches, throttled_ns,
        in_flight;
};

struct xen_ring {
    /* Constants of the ring, set before its thread starts. */
    tapfs_xen *device;
    uint32_t number;
    uint32_t references[RING_PAGES_MAX], page_count, port;
    struct xen_mapping mapping; /* its pages */
    struct xen_channel *channel;
    uint32_t entries;
    int wake_fd;
    pthread_t thread;
    bool started;
    struct mover *mover;

    /* The disk that is served now. The ring's thread owns these fields, but for the two that say otherwise. */
    struct xen_served served;
    uint64_t generation; /* of `served`; under the device's lock */
    bool quiet;          /* paused, and nothing in flight; under the device's lock */
    bool ended;          /* the frontend has broken the protocol: nothing is taken any more */
    uint32_t borrowed_failures; /* in a row */
    bool notified;       /* the channel has been readable and was not cleared since */
    uint64_t watch_ns;   /* how long to look for a request before a sleep; 0: not at all */

    /* Indices of the shared pages, which run freely over 32 bits. The ring's thread owns them. */
    uint32_t requests_taken;      /* the next request to take */
    uint32_t responses_written, responses_published;
    struct xen_transfer *barrier; /* taken last; nothing else is taken until its response is published */
    bool barrier_answered;

    /* Requests. The ring's thread owns them. */
    struct xen_journal_entry *journal; /* `entries` of them, in the file */
    _Atomic uint32_t *journal_consumed;
    struct xen_request *requests;      /* `entries` */
    struct xen_segment *segments;      /* of all requests */
    struct xen_request *idle_requests;
    struct xen_request *answered;      /* not yet published */
    struct xen_request **batch;        /* `entries`: just taken */
    uint32_t batch_count;

    /* Transfers. The ring's thread owns them. */
    struct xen_transfer *transfers; /* `entries` */
    struct iovec *parts;            /* of all transfers */
    struct xen_transfer *idle_transfers;
    struct xen_transfer *open[2];   /* a READ, a WRITE that can be added to */
    struct xen_transfers waiting;   /* for memory, in their order */
    bool begins_many;               /* of `waiting`, in this pass */
    struct xen_transfers gathering; /* to be parked, for memory */
    struct xen_transfers ended_moves;
    struct xen_transfers unsynced;  /* wait for a SYNC that has not begun */
    struct xen_transfer *sync;      /* the SYNC that is parked now, for itself and for `syncing` */
    struct xen_transfers syncing;   /* transfers that end when `sync` ends */

    /* Memory for data, ours and the frontend's. The ring's thread owns it. */
    struct xen_buffers buffers;
    struct xen_grants *grants;   /* MEMORY_HELD */
    struct xen_copy *pieces;     /* PIECES_MAX */
    struct xen_request **owners; /* of the pieces */
    uint32_t piece_count;
    uint32_t *page_references;   /* MOVE_PARTS_MAX */
    uint8_t **page_memory;

    /* Other threads give transfers back and read counters here. */
    pthread_mutex_t returned_lock;
    struct xen_transfers returned; /* parked transfers that have been resumed or completed */
    atomic_bool has_returned;
    struct xen_counters counters;
};

/* The ring's thread: serves the ring until the device stops. */
TAPFS_INTERNAL void *xen_ring_serve(void *ring);

/* ---- xen/ring_page.c: the pages that a ring shares with its frontend */

/* The start of the first page. */
struct ring_indices {
    _Atomic uint32_t requests_produced, requests_event, responses_produced, responses_event;
};

TAPFS_INTERNAL struct ring_indices *xen_ring_indices(const struct xen_ring *ring);
/* The entry of an index: a request's, then the response's. */
TAPFS_INTERNAL uint8_t *xen_ring_slot(const struct xen_ring *ring, uint32_t index);
/* How many responses the ring says are published. */
TAPFS_INTERNAL uint32_t xen_ring_responses(const struct xen_ring *ring);

/* ---- xen/responses.c */

/* Put a response into the ring. The frontend sees it when the batch is published. */
TAPFS_INTERNAL void xen_ring_answer(struct xen_ring *ring, struct xen_request *request);
/* The kind of a request in the words of metrics. */
TAPFS_INTERNAL uint32_t xen_metric_of(const struct xen_request *request);
/* Let the frontend see the responses; true if there were any. */
TAPFS_INTERNAL bool xen_ring_publish(struct xen_ring *ring);
TAPFS_INTERNAL void xen_ring_count_in_flight(struct xen_ring *ring);

/* ---- xen/wake.c: for any thread */

/* Make the ring's thread look around. */
TAPFS_INTERNAL void xen_ring_wake(struct xen_ring *ring);
/* Give a parked transfer back. */
TAPFS_INTERNAL void xen_ring_return(struct xen_transfer *transfer);
/* A ring ends: `problem` is a static string. */
TAPFS_INTERNAL void xen_device_ended(tapfs_xen *device, const char *problem);

static inline void xen_count(_Atomic uint64_t *counter, uint64_t amount)
{
    atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + amount, memory_order_relaxed);
}

/* ---- xen/ring_life.c */

/* Map its pages and bind its port. NULL, `error` set. */
TAPFS_INTERNAL struct xen_ring *xen_ring_new(tapfs_xen *device, const uint32_t *references, uint32_t count,
                                             uint32_t port, int *error);
/* Everything that it needs while it runs. 0 or an errno. */
TAPFS_INTERNAL int xen_ring_prepare(struct xen_ring *ring);
TAPFS_INTERNAL int xen_ring_start(struct xen_ring *ring);
/* Its thread has ended. */
TAPFS_INTERNAL void xen_ring_free(struct xen_ring *ring);

/* ---- xen/device.c */

struct tapfs_xen {
    tapfs_xen_options options;
    const struct xen_layout *layout;
    struct xen_transport *transport;
    struct xen_ring *rings[RINGS_MAX];
    uint32_t ring_count;
    struct xen_journal journal;
    struct rate_limit limit;
    struct park park;
    bool started, stopped;
    int ended_fd;
    _Atomic(const char *) problem;
    pthread_mutex_t lock;
    pthread_cond_t settled; /* a ring has become quiet or has taken over what is served */
    struct xen_served served;
    _Atomic uint64_t generation; /* of `served` */
    atomic_bool paused, stopping;
    tapfs_metrics metrics;
};

#endif
