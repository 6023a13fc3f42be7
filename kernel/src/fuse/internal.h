/*
 * Types and functions that the files of the FUSE server share. fuse/server.h is the interface.
 * kernel/src/fuse/CONCURRENCY.md has the rules of the locks.
 */
#ifndef TAPFS_FUSE_INTERNAL_H
#define TAPFS_FUSE_INTERNAL_H

#include <linux/fuse.h>

#include "fuse/server.h"
#include "mover/mover.h"
#include "serving/metrics.h"
#include "serving/park.h"

/* The largest read or write, and what the kernel is told: 256 pages. */
#define MESSAGE_DATA_MAX (1u << 20)
#define MESSAGE_PAGES 256
/* In a buffer the data of a request stands at a page boundary, its headers end there. */
#define BUFFER_DATA_AT 4096u
#define WRITE_HEADERS (sizeof(struct fuse_in_header) + sizeof(struct fuse_write_in))
#define BUFFER_MESSAGE_AT (BUFFER_DATA_AT - WRITE_HEADERS)
#define BUFFER_BYTES (BUFFER_DATA_AT + MESSAGE_DATA_MAX + 4096u)
#define MESSAGE_BYTES_MAX (BUFFER_BYTES - BUFFER_MESSAGE_AT)
/* Buffers beyond those of the threads. READs that find none wait for one in a queue. With so many WRITEs on their way
 * the threads read no more messages, for they would have no place for the data. */
#define READ_BUFFERS 64u
#define WRITE_BUFFERS 128u
/* Idle ones that are kept. */
#define IDLE_BUFFERS 16u
#define THREADS_MAX 16u

/* A file of pieces of the disk and of metadata (tapfs_fuse_give_pieces). */
struct fuse_pieces {
    uint64_t size;
    int metadata_fd;
    const uint64_t *starts, *offsets, *lengths;
    size_t count;
};

struct fuse_node {
    uint64_t inode, start, size;
    bool writable;
    bool made_later;
    _Atomic(struct fuse_pieces *) pieces; /* of what is made later, from then on */
    int backing_fd;              /* -1: none */
    _Atomic int32_t backing_id;  /* what the kernel calls it; 0: it has none */
};

/* Whose a buffer is. */
enum fuse_share { SHARE_THREAD, SHARE_READ, SHARE_WRITE };
#define SHARES 3

struct fuse_buffer {
    struct fuse_buffer *next;
    uint8_t *memory;
    enum fuse_share share;
    bool present; /* its pages */
};

/* A request of a data node, on the stack of its thread until it is parked or waits for the host. */
struct fuse_call {
    struct parked_entry entry; /* first: the park knows a call by it */
    struct fuse_call *next;    /* among those that wait for the host */
    const struct fuse_node *node;
    struct fuse_buffer *buffer; /* of a WRITE; of a READ while it has bytes */
    uint64_t unique;
    uint64_t since;          /* when it was read, as metrics_begin has it */
    uint64_t offset, length; /* of the node */
    uint64_t done;
    int fd; /* where the answer goes */
    atomic_bool interrupted; /* whoever waits for it has been sent a signal */
    uint32_t request;
    bool durable; /* a WRITE that is a SYNC when it is done, and answered after that */
    bool written; /* a SYNC that was a WRITE */
    tapfs_outcome outcome;
    struct iovec whole; /* the buffer, for `move` */
    struct move move;
};

struct fuse_calls {
    struct fuse_call *first, *last;
};

/* READs and WRITEs that wait for the host, and the thread that owns the mover. */
struct fuse_moves {
    pthread_mutex_t lock; /* of the next two */
    struct fuse_calls added;
    bool closed;
    int wake_fd; /* something was added, closed, or given back for which `starved` waits */
    atomic_bool starved;
    struct fuse_calls unbegun; /* READs that wait for a buffer. The thread's. */
    struct mover *mover;       /* the thread's */
    pthread_t thread;
    bool started;
};

/* The kernel's INIT request has 104 bytes, and may grow. */
#define INIT_REQUEST_MAX 256

/* A message on its way to the session. */
struct fuse_message {
    struct fuse_message *next;
    size_t length;
    int fd;
    struct fuse_in_header header; /* `length` bytes from here on */
};

struct fuse_thread {
    tapfs_fuse *server;
    pthread_t thread;
    uint32_t index;
    int fd;
    bool started;
    atomic_bool exited;
};

struct tapfs_fuse {
    tapfs_disk *disk;
    int fuse_fd, session_fd, ended_fd;
    int connections[THREADS_MAX]; /* the first is fuse_fd */
    uint32_t connection_count;
    struct fuse_node *nodes;
    size_t node_count;
    bool writable;
    struct fuse_thread threads[THREADS_MAX];
    uint32_t thread_count;
    _Atomic uint32_t threads_running;
    atomic_bool stopping;
    bool stopped;

    /* buffers */
    pthread_mutex_t buffer_lock;
    pthread_cond_t buffer_returned;
    struct fuse_buffer *idle;
    uint32_t idle_count, buffer_count[SHARES];

    struct park park;
    struct fuse_moves moves;
    _Atomic uint32_t sitting; /* native threads that wait in a transfer with the host */

    /* the session */
    pthread_mutex_t forward_lock;
    pthread_cond_t forward_filled;
    struct fuse_message *forward_first, *forward_last;
    bool session_closed;
    pthread_t forwarder, replier;
    bool forwarder_started, replier_started;
    _Atomic uint64_t init_unique;
    uint8_t init[INIT_REQUEST_MAX]; /* the kernel's request. Under `forward_lock`. */
    size_t init_length;
    bool taken_over; /* a predecessor has answered it */
    _Atomic uint64_t offered;  /* the flags that the kernel knows, both words */
    _Atomic uint32_t direct_opens; /* FOPEN flags for O_DIRECT */
    _Atomic uint32_t passthrough_nodes;

    _Atomic uint64_t reads, writes, parked, waited, forwarded, last_write;
    tapfs_metrics metrics;
};

/* ---- fuse/buffers.c */

/* For a thread that reads messages. NULL when the server is being stopped. */
TAPFS_INTERNAL struct fuse_buffer *fuse_buffer_take(tapfs_fuse *server);
/* For a READ; never waits. NULL: not now; with `never` set: there is no memory, and no READ will give any back. */
TAPFS_INTERNAL struct fuse_buffer *fuse_buffer_for_read(tapfs_fuse *server, bool *never);
/* A thread's buffer is a WRITE's from now on. */
TAPFS_INTERNAL void fuse_buffer_to_write(tapfs_fuse *server, struct fuse_buffer *buffer);
TAPFS_INTERNAL void fuse_buffer_return(tapfs_fuse *server, struct fuse_buffer *buffer);
/* `stopping` is set: wake the threads that wait for a buffer. */
TAPFS_INTERNAL void fuse_buffers_stop(tapfs_fuse *server);
TAPFS_INTERNAL void fuse_buffers_free(tapfs_fuse *server);

/* ---- fuse/answers.c */

/* Answer a request: an errno, or success with a payload. The kernel may have given it up: that is no error. */
TAPFS_INTERNAL void fuse_reply(int fd, uint64_t unique, int error, const void *payload, size_t length);
TAPFS_INTERNAL void fuse_signal_ended(tapfs_fuse *server);
/* The kind of a call in the words of metrics. */
TAPFS_INTERNAL uint32_t fuse_metric_of(uint32_t request);
/* Answer a call of any kind. `found`: what a SEEK has found, an offset of the disk. */
TAPFS_INTERNAL void fuse_answer(tapfs_fuse *server, const struct fuse_call *call, int error, uint64_t found);
/* Answer a call that fuse_call_keep made, give back its buffer and free it. One that is to be durable is parked first. */
TAPFS_INTERNAL void fuse_end(tapfs_fuse *server, struct fuse_call *call, int error, uint64_t found);
/* A copy of a call that outlives its thread's attention; NULL: no memory, and the call has been answered so. */
TAPFS_INTERNAL struct fuse_call *fuse_call_keep(tapfs_fuse *server, const struct fuse_call *call);
/* The park takes over a call that was kept, with its buffer. After the stop it fails with EIO. */
TAPFS_INTERNAL void fuse_park(tapfs_fuse *server, struct fuse_call *call);
/* Mark the parked request whose number is `unique`, if there is one. */
TAPFS_INTERNAL void fuse_interrupt(tapfs_fuse *server, uint64_t unique);
/* What is parked and not taken fails with EIO, and so does what comes later. */
TAPFS_INTERNAL void fuse_park_stop(tapfs_fuse *server);

/* ---- fuse/pieces.c: where the bytes of a node lie */

/* One range of the disk, or of the node's metadata. */
struct fuse_place {
    uint64_t offset, length;
    bool metadata;
};

TAPFS_INTERNAL uint64_t fuse_node_size(const struct fuse_node *node);
/* Where the rest of a call begins; as much of it as lies together. */
TAPFS_INTERNAL struct fuse_place fuse_place_of(const struct fuse_call *call);
/* Read metadata into the buffer of a READ; `outcome` says what came of it. */
TAPFS_INTERNAL void fuse_read_metadata(struct fuse_call *call, const struct fuse_place *place);

/* ---- fuse/moves.c: READs and WRITEs, between their buffers and the disk */

/* What has become of a READ or WRITE: its bytes are moved; it lacks what `outcome` says; it waits for the host. */
enum fuse_fate { FATE_MOVED, FATE_LACKS, FATE_WAITS };

/* Go on as far as goes without waiting for the host. */
TAPFS_INTERNAL enum fuse_fate fuse_move_at_once(tapfs_fuse *server, struct fuse_call *call);
/* The same for a native thread. Where the host cannot be asked whether it makes the thread wait, the thread may wait,
 * as long as another one is left to read the connection. */
TAPFS_INTERNAL enum fuse_fate fuse_move_in_thread(tapfs_fuse *server, struct fuse_call *call);
/* Go on, whatever it takes but the driver. Never FATE_WAITS. */
TAPFS_INTERNAL enum fuse_fate fuse_move_waiting(tapfs_fuse *server, struct fuse_call *call);
/* Have a call that was kept moved by the mover, then answered or parked. False: stopped, and it stays the caller's. */
TAPFS_INTERNAL bool fuse_moves_add(tapfs_fuse *server, struct fuse_call *call);
/* 0 or an errno. */
TAPFS_INTERNAL int fuse_moves_start(tapfs_fuse *server);
/* What has not begun fails with EIO, and so does what comes later. */
TAPFS_INTERNAL void fuse_moves_close(tapfs_fuse *server);
/* After it was closed: wait until what is with the host has ended and has been answered. */
TAPFS_INTERNAL void fuse_moves_join(tapfs_fuse *server);

/* ---- fuse/nodes.c */

/* NULL: the node is no data node. */
TAPFS_INTERNAL struct fuse_node *fuse_find_node(tapfs_fuse *server, uint64_t inode);
TAPFS_INTERNAL void fuse_nodes_free(tapfs_fuse *server);

/* ---- fuse/data.c: requests of data nodes */

/* Whether the request was one of a data node; then it is answered or parked, and `buffer` is NULL if that took it. */
TAPFS_INTERNAL bool fuse_data_request(const struct fuse_thread *thread, struct fuse_buffer **buffer, size_t length);

/* ---- fuse/session.c: everything else */

TAPFS_INTERNAL int fuse_session_start(tapfs_fuse *server);
TAPFS_INTERNAL void fuse_session_stop(tapfs_fuse *server);
TAPFS_INTERNAL void fuse_forward(const struct fuse_thread *thread, const uint8_t *message, size_t length);
/* Show the session the INIT that a predecessor was sent. */
TAPFS_INTERNAL void fuse_forward_again(tapfs_fuse *server);

/* ---- fuse/init.c: what is agreed with the kernel */

TAPFS_INTERNAL void fuse_init_asked(tapfs_fuse *server, const uint8_t *message, size_t length);
/* Amend the session's answer, `length` bytes with its header, `capacity` in all; the new length. */
TAPFS_INTERNAL size_t fuse_init_amend(tapfs_fuse *server, uint8_t *message, size_t length, size_t capacity);
/* The kernel has the answer: register the backing files. */
TAPFS_INTERNAL void fuse_init_answered(tapfs_fuse *server);
/* The kernel may have written to backing files past the engine: tell the engine before a sync. */
TAPFS_INTERNAL void fuse_note_passthrough(tapfs_fuse *server);
TAPFS_INTERNAL void fuse_backing_close(tapfs_fuse *server);

#endif
