/*
 * The FUSE server of a disk: native threads between /dev/fuse and a libfuse session.
 *
 * The threads answer requests of data nodes (windows of the disk) through the engine. They pass other requests to
 * the session, over a stream socket, unchanged. Like the engine they never call back. A request that needs a driver
 * (a map, a reservation, a flush) is parked. Threads of the owner take parked requests, serve them, and resume or
 * complete them.
 *
 * Threads: every function but tapfs_fuse_new, _add_node, _start and _free may be called from any
 * thread at any time between _start and _free. Offsets and lengths are bytes.
 */
#ifndef TAPFS_FUSE_SERVER_H
#define TAPFS_FUSE_SERVER_H

#include "serving/metrics.h"
#include "serving/serving.h"

/* cffi: begin */

typedef struct tapfs_fuse tapfs_fuse;

/* What a parked request wants. */
enum {
    TAPFS_FUSE_READ = 0,      /* what `outcome` says, then resume */
    TAPFS_FUSE_WRITE = 1,     /* likewise; or write `data` to the disk, then complete */
    TAPFS_FUSE_SYNC = 2,      /* make everything durable */
    TAPFS_FUSE_ZERO = 3,      /* make the range read as zeros, and free its space where that goes */
    TAPFS_FUSE_SEEK_DATA = 4, /* the first byte at or after `offset` that is no hole; -ENXIO: none in the range */
    TAPFS_FUSE_SEEK_HOLE = 5  /* the first byte at or after `offset` in a hole; the end of the range if none */
};

typedef struct {
    uint64_t reads;     /* answered through the engine */
    uint64_t writes;
    uint64_t parked;    /* times that a request was parked */
    uint64_t waited;    /* times that a read or write was given to the mover, because the host had to be waited for */
    uint64_t forwarded; /* passed to the session */
} tapfs_fuse_statistics;

/*
 * Takes over `fuse_fd`, a connection to the kernel, and `session_fd`, one end of a stream socket
 * pair whose other end the libfuse session reads; both are closed by tapfs_fuse_free. The disk stays
 * the caller's and must outlive the server. NULL with errno set; the descriptors are untouched then.
 */
tapfs_fuse *tapfs_fuse_new(int fuse_fd, int session_fd, tapfs_disk *disk);

/*
 * Serve [start, start + size) of the disk as the node `inode`. With a `backing_fd`, a regular file
 * that is the node byte for byte, the kernel is asked to read and write that itself; it stays the
 * caller's and is needed until the mount has answered its first request. 0 or -errno. Before start.
 */
int tapfs_fuse_add_node(tapfs_fuse *server, uint64_t inode, uint64_t start, uint64_t size, int writable,
                        int backing_fd);

/*
 * A node whose file is made later: until tapfs_fuse_give_pieces its requests go to the session, and those that open and
 * close it always do. 0 or -errno. Before start.
 */
int tapfs_fuse_add_made_node(tapfs_fuse *server, uint64_t inode);
/*
 * The file of such a node: `size` bytes, in each [starts[i], starts[i] + lengths[i]) those of the disk from offsets[i] on,
 * elsewhere those of `metadata_fd`, a file in memory behind whose end there are zeros. The starts ascend, and no pieces overlap.
 * Arrays and descriptor stay the caller's and outlive the server. Once for a node, from any thread. 0 or -errno (-EINVAL:
 * nothing was taken).
 */
int tapfs_fuse_give_pieces(tapfs_fuse *server, uint64_t inode, uint64_t size, int metadata_fd, const uint64_t *starts,
                           const uint64_t *offsets, const uint64_t *lengths, size_t count);

/*
 * One more descriptor of the connection (FUSE_DEV_IOC_CLONE), for one more thread; taken over. 0 or -errno. Before start. A
 * thread has each that is there, and further threads share the first.
 */
int tapfs_fuse_add_connection(tapfs_fuse *server, int fuse_fd);

/*
 * Go on where another process has served the connection: `init` is the kernel's INIT to it (tapfs_fuse_init_request). The
 * session is shown that request again, and its answer is not passed on. The kernel gives the requests again that were not
 * answered. 0 or -errno: -EINVAL where the kernel cannot. After the nodes were added, before start.
 */
int tapfs_fuse_take_over(tapfs_fuse *server, const void *init, size_t length);
/* What the kernel knows the backing file of a node by, registered by a predecessor. Before start. 0 or -errno. */
int tapfs_fuse_set_backing(tapfs_fuse *server, uint64_t inode, int32_t backing_id);
/* The same of this server; 0: the kernel does not serve the node. Known once the mount has answered a request. */
int32_t tapfs_fuse_backing(tapfs_fuse *server, uint64_t inode);
/* The kernel's INIT request: its length, at most `capacity`; 0 if a successor could not go on with this connection. */
size_t tapfs_fuse_init_request(tapfs_fuse *server, void *init, size_t capacity);

/* Start `threads` (1 to 16) native threads. 0 or -errno; after an error only free may follow. */
int tapfs_fuse_start(tapfs_fuse *server, uint32_t threads);

/* A descriptor that becomes readable when the kernel ends the connection (unmount) or the session does. */
int tapfs_fuse_ended_fd(tapfs_fuse *server);

/* The nodes that the kernel serves by itself; known once the mount has answered a request. */
uint32_t tapfs_fuse_passthrough_nodes(tapfs_fuse *server);

/* Wait for parked requests and take up to `capacity`: how many, or 0 when the server is being stopped. */
size_t tapfs_fuse_next_parked(tapfs_fuse *server, uint32_t queue, tapfs_parked *parked, size_t capacity);
/* Try a READ or WRITE again: 0 when it has been answered, else 1 and what is missing now. */
int tapfs_fuse_resume_parked(tapfs_fuse *server, uint64_t ticket, tapfs_parked *parked);
/* Whether nobody waits for the answer to a parked request any more: its user was sent a signal, or the server stops. Who
 * serves it may then fail it, with EINTR. */
int tapfs_fuse_given_up(tapfs_fuse *server, uint64_t ticket);
/* Answer a parked request with an errno, or with success (0): a WRITE is written whole, a SEEK has
 * found `found`, an offset of the disk. */
void tapfs_fuse_complete(tapfs_fuse *server, uint64_t ticket, int error, uint64_t found);

/*
 * End the native threads. What is parked and not taken fails with EIO; what is taken is completed
 * by who took it, before free. Requests that come after it wait for free, which ends the connection.
 */
void tapfs_fuse_stop(tapfs_fuse *server);
/* Stops first if need be. */
void tapfs_fuse_free(tapfs_fuse *server);

void tapfs_fuse_counters(tapfs_fuse *server, tapfs_fuse_statistics *statistics);
/* What was asked for since the start; valid as long as the server is. */
const tapfs_metrics *tapfs_fuse_metrics(const tapfs_fuse *server);
/* When the last write through the engine ended, in nanoseconds since 1970; 0: there was none. */
uint64_t tapfs_fuse_last_write(tapfs_fuse *server);

/* cffi: end */

#endif
