/*
 * Types and functions that the files of the FUSE server share. fuse/server.h is the interface.
 * kernel/CONCURRENCY.md has the rules of the locks.
 */
#ifndef TAPFS_FUSE_INTERNAL_H
#define TAPFS_FUSE_INTERNAL_H

#include <linux/fuse.h>

#include "engine/internal.h"
#include "fuse/server.h"
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
/* Buffers beyond those of the threads: so many reads and writes can be parked. */
#define PARKED_BUFFERS 32u
/* Idle ones that are kept. */
#define IDLE_BUFFERS 8u
#define THREADS_MAX 16u

struct fuse_node {
    uint64_t inode, start, size;
    bool writable;
    int backing_fd;              /* -1: none */
    _Atomic int32_t backing_id;  /* what the kernel calls it; 0: it has none */
};

struct fuse_buffer {
    struct fuse_buffer *next;
    uint8_t *memory;
};

/* A request of a data node, on the stack of its thread until it is parked. */
struct fuse_call {
    struct parked_entry entry; /* first: the park knows a call by it */
    const struct fuse_node *node;
    struct fuse_buffer *buffer; /* READ and WRITE */
    uint64_t unique;
    uint64_t offset, length; /* of the node */
    uint64_t done;
    int fd; /* where the answer goes */
    atomic_bool interrupted; /* whoever waits for it has been sent a signal */
    uint32_t request;
    tapfs_outcome outcome;
};

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
    uint32_t idle_count, buffer_count, buffer_limit;

    struct park park;

    /* the session */
    pthread_mutex_t forward_lock;
    pthread_cond_t forward_filled;
    struct fuse_message *forward_first, *forward_last;
    bool session_closed;
    pthread_t forwarder, replier;
    bool forwarder_started, replier_started;
    _Atomic uint64_t init_unique;
    _Atomic uint64_t offered;  /* the flags that the kernel knows, both words */
    _Atomic uint32_t direct_opens; /* FOPEN flags for O_DIRECT */
    _Atomic uint32_t passthrough_nodes;

    _Atomic uint64_t reads, writes, parked, forwarded, last_write;
};

/* ---- fuse/buffers.c */

/* NULL when the server is being stopped. */
TAPFS_INTERNAL struct fuse_buffer *fuse_buffer_take(tapfs_fuse *server);
TAPFS_INTERNAL void fuse_buffer_return(tapfs_fuse *server, struct fuse_buffer *buffer);
/* `stopping` is set: wake the threads that wait for a buffer. */
TAPFS_INTERNAL void fuse_buffers_stop(tapfs_fuse *server);
TAPFS_INTERNAL void fuse_buffers_free(tapfs_fuse *server);

/* ---- fuse/answers.c */

/* Answer a request: an errno, or success with a payload. The kernel may have given it up: that is no error. */
TAPFS_INTERNAL void fuse_reply(int fd, uint64_t unique, int error, const void *payload, size_t length);
TAPFS_INTERNAL void fuse_signal_ended(tapfs_fuse *server);
/* Note a write that is done, before it is answered. */
TAPFS_INTERNAL void fuse_wrote(tapfs_fuse *server);
/* Answer a call of any kind and give back its buffer. `found`: what a SEEK has found, an offset of the disk. */
TAPFS_INTERNAL void fuse_answer(tapfs_fuse *server, const struct fuse_call *call, int error, uint64_t found);
/* The park takes over the call's buffer; the call itself is copied. After the stop it fails with EIO. */
TAPFS_INTERNAL void fuse_park(tapfs_fuse *server, const struct fuse_call *call);
/* Mark the parked request whose number is `unique`, if there is one. */
TAPFS_INTERNAL void fuse_interrupt(tapfs_fuse *server, uint64_t unique);
/* What is parked and not taken fails with EIO, and so does what comes later. */
TAPFS_INTERNAL void fuse_park_stop(tapfs_fuse *server);

/* ---- fuse/data.c: requests of data nodes */

/* Whether the request was one of a data node; then it is answered or parked, and `buffer` is NULL if that took it. */
TAPFS_INTERNAL bool fuse_data_request(const struct fuse_thread *thread, struct fuse_buffer **buffer, size_t length);
/* Go on with a READ or WRITE; true when it has been answered. */
TAPFS_INTERNAL bool fuse_move(tapfs_fuse *server, struct fuse_call *call);

/* ---- fuse/session.c: everything else */

TAPFS_INTERNAL int fuse_session_start(tapfs_fuse *server);
TAPFS_INTERNAL void fuse_session_stop(tapfs_fuse *server);
TAPFS_INTERNAL void fuse_forward(const struct fuse_thread *thread, const uint8_t *message, size_t length);

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
