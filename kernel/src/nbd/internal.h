/*
 * Types and functions that the files of the NBD server share. nbd/nbd.h is the interface.
 * kernel/src/nbd/CONCURRENCY.md has the rules of the threads.
 */
#ifndef TAPFS_NBD_INTERNAL_H
#define TAPFS_NBD_INTERNAL_H

#include <errno.h>
#include <pthread.h>

#include "mover/mover.h"
#include "nbd/nbd.h"
#include "serving/metrics.h"
#include "serving/park.h"
#include "serving/rate_limit.h"

/* ---- bounds. A client can make the server hold CONNECTION_BYTES and one piece more, whatever it does. */

/* A longer read or write is done in pieces of so many bytes. */
#define PIECE_BYTES (1u << 20)
/* No more requests are taken from a client that has so many bytes, or requests, unanswered or untaken. */
#define CONNECTION_BYTES (8u << 20)
#define CONNECTION_REQUESTS 256u
#define INPUT_BYTES (64u << 10)
/* What stands for a request without data against CONNECTION_BYTES. */
#define REQUEST_BYTES 512u
/* A payload that is still to come in this length goes straight to its place. */
#define DIRECT_BYTES 4096u
/* Runs of one context in a reply. */
#define STATES_MAX 2048u
#define CONTEXTS_MAX 32u
#define LOOPS_MAX 16u
/* What may be read of a disk that is to be had LATER: an emulator guesses a geometry from it before its machine runs. */
#define FIRST_PAGE 4096u

/* ---- the protocol: docs/specs/nbd.md */

enum {
    CMD_READ = 0,
    CMD_WRITE = 1,
    CMD_DISC = 2,
    CMD_FLUSH = 3,
    CMD_TRIM = 4,
    CMD_CACHE = 5,
    CMD_WRITE_ZEROES = 6,
    CMD_BLOCK_STATUS = 7
};
enum {
    FLAG_FUA = 1,
    FLAG_NO_HOLE = 2,
    FLAG_DF = 4,
    FLAG_REQ_ONE = 8,
    FLAG_FAST_ZERO = 16,
    FLAG_PAYLOAD_LEN = 32
};
enum {
    CHUNK_NONE = 0,
    CHUNK_OFFSET_DATA = 1,
    CHUNK_OFFSET_HOLE = 2,
    CHUNK_BLOCK_STATUS = 5,
    CHUNK_BLOCK_STATUS_EXT = 6,
    CHUNK_ERROR = 0x8001
};
#define CHUNK_DONE 1u
/* The most that stands before the data of a reply: an extended header and an offset. */
#define HEADER_MAX 40u

/* ---- the things */

struct nbd_connection;

/* Bytes that wait to be sent. */
struct nbd_output {
    struct nbd_output *next;
    const uint8_t *bytes;
    size_t length, sent;
    size_t held; /* counted in connection.held until they are sent */
    void *memory; /* to be given back then */
    bool spare;   /* it is of the size that is kept */
};

/* What a client has asked for. It belongs to the thread of its connection, as all here but what a parked piece has. */
struct nbd_request {
    struct nbd_connection *connection;
    tapfs_nbd_asked asked;
    uint32_t contexts; /* that a BLOCK_STATUS is about, bit by bit */
    uint64_t since;  /* when it was taken, as metrics_begin has it */
    uint64_t begun;  /* bytes of it that pieces have been begun for */
    uint32_t pieces; /* under way */
    int error;       /* the first */
    bool answering;  /* SIMPLE: a first part of the answer is on its way */
    bool synced;     /* the SYNC of its FUA is under way or done */
};

/* The runs of a context, for the answer to a STATUS. */
struct nbd_states {
    struct nbd_states *next;
    uint32_t context;
    size_t count;
    tapfs_nbd_state states[];
};

/* A part of a request that is moved, parked and resumed by itself. */
struct nbd_piece {
    struct parked_entry entry; /* first: the park knows a piece by it */
    struct nbd_piece *next;    /* among those that were given back */
    struct nbd_request *request;
    struct nbd_connection *connection; /* the same as the request's */
    uint32_t kind;             /* TAPFS_NBD_READ, ... */
    uint64_t offset, length;   /* of the disk */
    int error;  /* it is given back with this, if it does not go on */
    bool goes_on; /* given back to be moved by the mover */
    uint64_t tried; /* when it was begun, or was begun again */
    size_t held;
    bool spare; /* it has room for PIECE_BYTES, and is kept for the next one */
    struct nbd_states *states, **states_end; /* of a STATUS */
    struct nbd_output output;
    struct iovec whole; /* the data, for `move` */
    struct move move;   /* of a READ or WRITE: how far it is, and what it lacks */
    uint64_t room[HEADER_MAX / 8]; /* for a header, right before the data */
    uint8_t data[];
};

struct nbd_connection {
    struct nbd_connection *next, *previous; /* of its loop */
    struct nbd_connection *next_touched;
    struct nbd_loop *loop;
    int fd;
    uint32_t style, contexts;
    uint32_t events;     /* that its socket is watched for */
    bool touched;        /* on the loop's list of those to be looked after */
    bool ended;          /* takes no more requests: DISC, the end of the stream, or the stop */
    atomic_bool gone;    /* the client: nothing is sent any more. The owner's threads ask for it, too */
    uint32_t requests;   /* unanswered */
    size_t held;         /* bytes in memory for it */

    struct nbd_request *current; /* a READ or WRITE whose pieces are not all begun */
    struct nbd_piece *filling;   /* the piece of a WRITE whose data is coming */
    uint64_t filled;
    uint64_t skipping; /* bytes of a payload that nobody wants */

    struct nbd_output *output, **output_end;
    size_t input_start, input_end;
    uint8_t input[INPUT_BYTES];
};

/* A native thread and what belongs to it. */
struct nbd_loop {
    tapfs_nbd *server;
    pthread_t thread;
    int epoll_fd, wake_fd;
    struct mover *mover;
    struct nbd_connection *connections, *touched;
    struct spare *spares; /* memory for large pieces */
    uint32_t spare_count;
    uint32_t under_way; /* pieces that were begun and have not ended */
    bool held;          /* it has seen a pause, and not the end of it */
    uint64_t limited_until; /* in ns as rate_limit_now has it, clients wait until then; 0: none waits for the rate limit */
    uint64_t stop_at; /* in milliseconds of the monotonic clock; 0: it does not stop */
    uint32_t short_waits; /* that ended soon, one after the other */
    uint32_t short_waits_needed; /* before it looks again instead of sleeping; 0: it never does */

    pthread_mutex_t lock; /* of the next three */
    struct nbd_piece *returned;
    struct nbd_connection *added; /* by `next` */
    bool stopping;
    _Atomic uint32_t load; /* connections that it has or will have */

    /* Under the server's lock: paused, and nothing under way; and the disk that the mover has. */
    bool quiet;
    uint32_t generation;
};

struct tapfs_nbd {
    tapfs_disk *disk;
    uint64_t size;
    uint32_t access; /* TAPFS_NBD_READ_ONLY, ... */
    int ended_fd;
    atomic_bool stopping, paused, waits;
    _Atomic uint32_t generation; /* of the disk */
    pthread_mutex_t lock;        /* of what loops say of a pause */
    pthread_cond_t settled;
    bool stopped;
    struct rate_limit limit;
    struct park park;
    struct nbd_loop loops[LOOPS_MAX];
    uint32_t loop_count;
    _Atomic uint64_t reads, writes, parked, waited, connections, held;
    tapfs_metrics metrics;
};

/* ---- nbd/wire.c: numbers in the order of the network, headers of replies */

TAPFS_INTERNAL void nbd_put16(uint8_t *at, uint16_t value);
TAPFS_INTERNAL void nbd_put32(uint8_t *at, uint32_t value);
TAPFS_INTERNAL void nbd_put64(uint8_t *at, uint64_t value);
TAPFS_INTERNAL uint32_t nbd_get32(const uint8_t *at);
TAPFS_INTERNAL uint64_t nbd_get64(const uint8_t *at);
/* The header of a simple reply at `at`; its length. */
TAPFS_INTERNAL size_t nbd_simple_header(uint8_t *at, uint64_t cookie, int error);
/* The header of a chunk; its length, at most HEADER_MAX - 8. */
TAPFS_INTERNAL size_t nbd_chunk_header(uint8_t *at, bool extended, const tapfs_nbd_asked *asked, uint16_t flags,
                                       uint16_t type, uint64_t payload);
TAPFS_INTERNAL size_t nbd_chunk_header_length(bool extended);
/* One of the errors that the protocol has. */
TAPFS_INTERNAL int nbd_error(int error);

/* ---- nbd/memory.c: memory of pieces. What is large is kept for the next piece, because the host takes long to give it */

/* `bytes` of memory, `spare` set if it is of the size that is kept; NULL: none. */
TAPFS_INTERNAL void *nbd_memory_take(struct nbd_loop *loop, size_t bytes, bool *spare);
TAPFS_INTERNAL void nbd_memory_give(struct nbd_loop *loop, void *memory, bool spare);
TAPFS_INTERNAL void nbd_memory_free(struct nbd_loop *loop);

/* ---- nbd/output.c: what is sent */

TAPFS_INTERNAL void nbd_hold(struct nbd_connection *connection, size_t bytes);
TAPFS_INTERNAL void nbd_let_go(struct nbd_connection *connection, size_t bytes);
/* Look after the connection before the loop waits again. */
TAPFS_INTERNAL void nbd_touch(struct nbd_connection *connection);
TAPFS_INTERNAL void nbd_send(struct nbd_connection *connection, struct nbd_output *output);
/* Bytes that are copied; false: no memory. */
TAPFS_INTERNAL bool nbd_send_copy(struct nbd_connection *connection, const void *bytes, size_t length);
/* Send what the socket takes. False: the client is gone. */
TAPFS_INTERNAL bool nbd_send_queued(struct nbd_connection *connection);
/* Nobody takes what is queued, nor what will be. */
TAPFS_INTERNAL void nbd_drop_output(struct nbd_connection *connection);

/* ---- nbd/answers.c: the end of pieces and requests */

/* A piece of a request has ended. It is freed, now or once it is sent; the request is answered and freed, too, if it was
 * the last. But a request that is to be made durable first is given back: it has no piece then. */
TAPFS_INTERNAL struct nbd_request *nbd_piece_ended(struct nbd_piece *piece, int error);
/* Answer a request that has no piece under way, and free it. */
TAPFS_INTERNAL void nbd_request_answer(struct nbd_request *request, int error);
/* The kind of a request in the words of metrics. */
TAPFS_INTERNAL uint32_t nbd_metric_of(uint32_t command);
/* Whether no piece of it is under way or to come. */
TAPFS_INTERNAL bool nbd_request_is_done(const struct nbd_request *request);

/* ---- nbd/pieces.c */

/* A piece of a request, counted in it; NULL: no memory. */
TAPFS_INTERNAL struct nbd_piece *nbd_piece_new(struct nbd_request *request, uint32_t kind, uint64_t offset,
                                               uint64_t length, size_t data_bytes);
/* Have it done: by the mover, or by the owner's threads. */
TAPFS_INTERNAL void nbd_piece_begin(struct nbd_piece *piece);
/* What the mover has ended. */
TAPFS_INTERNAL void nbd_pieces_moved(struct nbd_loop *loop);
/* What the owner's threads have given back. */
TAPFS_INTERNAL void nbd_pieces_returned(struct nbd_piece *returned);
/* Give a piece back to the loop of its connection. From any thread. */
TAPFS_INTERNAL void nbd_piece_return(struct nbd_piece *piece);
/* What is parked and not taken is given back, and nothing is parked any more. */
TAPFS_INTERNAL void nbd_park_stop(tapfs_nbd *server);

/* ---- nbd/input.c */

/* All that was read is taken; there is no room for more; the client broke the protocol. */
enum nbd_parsed { PARSED_ALL, PARSED_NO_ROOM, PARSED_NONSENSE };

/* Go on with what was read from a client, as far as there is room. */
TAPFS_INTERNAL enum nbd_parsed nbd_parse(struct nbd_connection *connection);
/* The same with new bytes of the socket, as far as there are any. False: the client broke the protocol or is gone. */
TAPFS_INTERNAL bool nbd_input(struct nbd_connection *connection);

/* ---- nbd/connection.c */

TAPFS_INTERNAL struct nbd_connection *nbd_connection_new(struct nbd_loop *loop, int fd, uint32_t style,
                                                         uint32_t contexts);
/* What its socket is ready for, in the words of epoll. */
TAPFS_INTERNAL void nbd_connection_ready(struct nbd_connection *connection, uint32_t events);
/* Send what waits, and go on with what there is room for now. False: it is over, and nothing of it is under way. */
TAPFS_INTERNAL bool nbd_connection_look_after(struct nbd_connection *connection);
/* Take no more requests from it. */
TAPFS_INTERNAL void nbd_connection_end(struct nbd_connection *connection);
/* The client is gone, or has to go. What is under way is done for nobody. */
TAPFS_INTERNAL void nbd_connection_cut(struct nbd_connection *connection);
TAPFS_INTERNAL void nbd_connection_free(struct nbd_connection *connection);

/* ---- nbd/loop.c */

/* 0 or an errno; after an error it is as if it had not been called. */
TAPFS_INTERNAL int nbd_loop_start(struct nbd_loop *loop, tapfs_nbd *server);
/* Have it look at what has changed. Any thread, as long as the loop has not been joined. */
TAPFS_INTERNAL void nbd_loop_wake(struct nbd_loop *loop);
/* Have it serve a connection; false: it stops. */
TAPFS_INTERNAL bool nbd_loop_add(struct nbd_loop *loop, struct nbd_connection *connection);
TAPFS_INTERNAL void nbd_loop_stop(struct nbd_loop *loop);
/* Wait for the end of a loop that was stopped. nbd_loop_add may still be called: it refuses. */
TAPFS_INTERNAL void nbd_loop_join(struct nbd_loop *loop);
/* Nobody uses the loop any more. */
TAPFS_INTERNAL void nbd_loop_free(struct nbd_loop *loop);

#endif
