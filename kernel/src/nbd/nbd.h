/*
 * The NBD server of a disk: native threads between clients' sockets and the engine, after the negotiation.
 *
 * The owner negotiates with a client and hands its socket over. The threads read requests and answer them through the
 * engine. Like the engine they never call back. A request that needs a driver (a map, a reservation, a flush) is
 * parked. Threads of the owner take parked requests, serve them, and resume or complete them.
 *
 * Threads: every function but tapfs_nbd_new, _start and _free may be called from any thread at any time between _start
 * and _free. Offsets and lengths are bytes. docs/specs/nbd.md has the protocol.
 */
#ifndef TAPFS_NBD_H
#define TAPFS_NBD_H

#include "serving/metrics.h"
#include "serving/serving.h"

/* cffi: begin */

typedef struct tapfs_nbd tapfs_nbd;

/* What a parked request wants. */
enum {
    TAPFS_NBD_READ = 0,      /* what `outcome` says, then resume */
    TAPFS_NBD_WRITE = 1,     /* likewise; or write `data` to the disk, then complete */
    TAPFS_NBD_SYNC = 2,      /* make everything durable */
    TAPFS_NBD_ZERO = 3,      /* make the range read as zeros, and free its space where that goes */
    TAPFS_NBD_FILL = 4,      /* make the range read as zeros that take space */
    TAPFS_NBD_FAST_ZERO = 5, /* as ZERO, but EOPNOTSUPP where it would take as long as writing */
    TAPFS_NBD_DISCARD = 6,   /* the contents of the range are not needed any more */
    TAPFS_NBD_CACHE = 7,     /* have the host read the range into its memory */
    TAPFS_NBD_STATUS = 8     /* the states of the range, by tapfs_nbd_add_states */
};

/* How replies look: what was negotiated. */
enum { TAPFS_NBD_SIMPLE = 0, TAPFS_NBD_STRUCTURED = 1, TAPFS_NBD_EXTENDED = 2 };

/* The longest read or write that a client may ask for. */
#define TAPFS_NBD_REQUEST_MAX 33554432

/* A run of the disk and its state, in the bits of its context. */
typedef struct {
    uint64_t length;
    uint64_t state;
} tapfs_nbd_state;

typedef struct {
    uint64_t reads; /* answered with success */
    uint64_t writes;
    uint64_t parked;      /* times that a request was parked */
    uint64_t waited;      /* times that a read or write was with the host while others went on */
    uint64_t connections; /* open now */
    uint64_t held;        /* bytes of requests and replies in memory now */
} tapfs_nbd_statistics;

/*
 * What clients may do with a disk: only read it, or write it, too. LATER: they may read its first page and flush. Any
 * other request waits for tapfs_nbd_set_disk, with all that its client asks after it.
 */
enum { TAPFS_NBD_READ_ONLY = 0, TAPFS_NBD_WRITABLE = 1, TAPFS_NBD_LATER = 2 };

/* Serve a disk, which stays the caller's and must outlive the server. NULL with errno set. */
tapfs_nbd *tapfs_nbd_new(tapfs_disk *disk, uint64_t size, uint32_t access);

/* Start `threads` (1 to 16) native threads. 0 or -errno; after an error only free may follow. */
int tapfs_nbd_start(tapfs_nbd *server, uint32_t threads);

/*
 * Serve a client whose negotiation is over: `style` says how replies look, bit i of `contexts` that it has selected the
 * context i. Takes over `fd`, a socket that does not block, unless it fails. 0 or -errno.
 */
int tapfs_nbd_add(tapfs_nbd *server, int fd, uint32_t style, uint32_t contexts);

/* A descriptor that becomes readable when a connection has ended, and when a request waits (LATER). Reading it is the
 * caller's. */
int tapfs_nbd_ended_fd(tapfs_nbd *server);
/* Whether a request waits, or has waited, since the disk was set (LATER). */
int tapfs_nbd_waits(tapfs_nbd *server);

/*
 * Begin nothing more that clients ask for, and wait until nothing is under way: a long request may be half done then.
 * Connections stay. These three and _stop are for one thread at a time, which has no parked request in hand.
 */
void tapfs_nbd_pause(tapfs_nbd *server);
/* While paused: serve another disk, which the caller keeps instead of the old one. */
void tapfs_nbd_set_disk(tapfs_nbd *server, tapfs_disk *disk, uint64_t size, uint32_t access);
void tapfs_nbd_unpause(tapfs_nbd *server);

/* Begin no more than so much in a second, for all clients together; 0: no limit. A read or write counts once for each
 * megabyte that it has begun. Any time. */
void tapfs_nbd_limit(tapfs_nbd *server, uint64_t bytes_per_second, uint64_t requests_per_second);

/* Wait for parked requests and take up to `capacity`: how many, or 0 when the server is being stopped. */
size_t tapfs_nbd_next_parked(tapfs_nbd *server, uint32_t queue, tapfs_parked *parked, size_t capacity);
/* Try a READ or WRITE again: 0 when it is done with, else 1 and what is missing now. */
int tapfs_nbd_resume_parked(tapfs_nbd *server, uint64_t ticket, tapfs_parked *parked);
/* Whether nobody waits for the answer to a parked request any more: its client is gone, or the server stops. */
int tapfs_nbd_given_up(tapfs_nbd *server, uint64_t ticket);
/* Which contexts a parked STATUS wants, bit by bit; `single`: one run of each is enough. */
uint32_t tapfs_nbd_wanted(tapfs_nbd *server, uint64_t ticket, int *single);
/* The states of the range in one of the wanted contexts, from its start; once for each. 0 or -ENOMEM. */
int tapfs_nbd_add_states(tapfs_nbd *server, uint64_t ticket, uint32_t context, const tapfs_nbd_state *states,
                         size_t count);
/* Answer a parked request with an errno, or with success (0): a WRITE is written whole. */
void tapfs_nbd_complete(tapfs_nbd *server, uint64_t ticket, int error);

/*
 * Take no more requests, answer those that were taken, and end the connections and the native threads. What is parked
 * and not taken fails with ESHUTDOWN. It waits for the threads of the owner that have taken something, and a few
 * seconds at most for clients.
 */
void tapfs_nbd_stop(tapfs_nbd *server);
/* Stops first if need be. Nobody may have a parked request in hand. */
void tapfs_nbd_free(tapfs_nbd *server);

void tapfs_nbd_counters(tapfs_nbd *server, tapfs_nbd_statistics *statistics);
/* What was asked for since the start; valid as long as the server is. */
const tapfs_metrics *tapfs_nbd_metrics(const tapfs_nbd *server);

typedef struct tapfs_tls tapfs_tls;

/* The longest key that is shared with a client. */
#define TAPFS_TLS_KEY_MAX 64

/* The server's side of TLS. Certificates and keys come before the first client. NULL: no memory. */
tapfs_tls *tapfs_tls_new(void);
/* Show clients a certificate, both files in PEM. `verify`: they must have one that `authority` has signed. 0 or -EINVAL. */
int tapfs_tls_use_certificate(tapfs_tls *tls, const char *certificate, const char *key, const char *authority,
                              int verify);
/* Let in clients that know this key under this name. 0, -EINVAL or -ENOMEM. */
int tapfs_tls_add_key(tapfs_tls *tls, const char *identity, const uint8_t *key, size_t length);
/* Begin TLS on a client's socket, which does not block. The other end of it without TLS, a socket that does not block
 * either, or -errno. Takes over `fd`, unless it fails. */
int tapfs_tls_begin(tapfs_tls *tls, int fd);
/* How the last handshake failed, as text; it is forgotten then. */
void tapfs_tls_why(tapfs_tls *tls, char *text, size_t capacity);
/* Wait until the clients' connections have ended, which are cut after two seconds. */
void tapfs_tls_free(tapfs_tls *tls);

/*
 * The codec alone, for tests: what the first bytes of a message are. The number of bytes of the message's header, 0 if
 * more are needed, -EPROTO if it is none.
 */
typedef struct {
    uint16_t flags, command;
    uint64_t cookie, offset, length;
} tapfs_nbd_asked;
int tapfs_nbd_decode(const uint8_t *bytes, size_t length, int extended, tapfs_nbd_asked *asked);

/* cffi: end */

#endif
