/*
 * A Xen block device's rings (blkif): native threads that answer a frontend's requests from an engine disk.
 *
 * One tapfs_xen is one device of one frontend with one or more rings. A thread for each ring takes requests,
 * checks every field, moves the data, answers. A request that needs a driver (a map, a reservation) or the host's disk
 * (flush, discard) is parked for the owner's threads.
 *
 * After a crash: the journal file holds every request that was taken and not answered, so that after a kill -9 the
 * next process takes the rings up where they were (kernel/src/xen/JOURNAL.md).
 */
#ifndef TAPFS_XEN_H
#define TAPFS_XEN_H

#include "serving/metrics.h"
#include "serving/serving.h"

/* cffi: begin */

typedef struct tapfs_xen tapfs_xen;

/* The frontend's ABI ("protocol"). Native is that of this process. */
enum { TAPFS_XEN_NATIVE = 0, TAPFS_XEN_X86_32 = 1, TAPFS_XEN_X86_64 = 2 };
/* How data comes from and to the frontend's pages. */
enum { TAPFS_XEN_COPY = 0, TAPFS_XEN_MAP = 1, TAPFS_XEN_PERSISTENT = 2 };
/*
 * What a parked request wants: a READ or WRITE what `outcome` says, then resume; or a WRITE that `data` is written, then
 * complete. A SYNC that everything becomes durable. The answer of a write must outlive this process: who completes it, or
 * reserves for it, sees to that (tapfs/disk/plan_log.py).
 */
enum { TAPFS_XEN_READ = 0, TAPFS_XEN_WRITE = 1, TAPFS_XEN_SYNC = 2, TAPFS_XEN_DISCARD = 3 };

typedef struct {
    const char *machine; /* NULL: real Xen; else the directory of a simulated machine (xen/transport.h) */
    uint32_t domain;
    uint32_t protocol;
    uint32_t grants;
    uint32_t indirect_segments; /* the most that an indirect request may have, up to 256; 0: no such requests */
    uint32_t workers;
    int32_t journal;   /* a file in memory (tmpfs), read-write; sized by tapfs_xen_start; stays the caller's */
    uint8_t writable;  /* else writes, discards and flushes are refused */
    uint8_t discard;   /* discard is offered */
    uint8_t io_uring;  /* use it where the kernel has it */
    uint8_t reserved;
} tapfs_xen_options;

typedef struct {
    uint64_t reads, writes, flushes, barriers, discards; /* requests answered, whatever the answer */
    uint64_t read_bytes, written_bytes;
    uint64_t errors;        /* answered with an error */
    uint64_t merged;        /* requests that were moved together with the one before */
    uint64_t parked;
    uint64_t at_once;       /* moved by the ring's thread without waiting */
    uint64_t borrowed;      /* of these, copied to the frontend out of the host's own memory */
    uint64_t notifications; /* sent */
    uint64_t batches;       /* of responses published */
    uint64_t throttled_ns;  /* time that requests waited for the rate limit */
    uint64_t in_flight;
} tapfs_xen_statistics;

/* NULL with errno set. The disk and the journal stay the caller's and must outlive it. */
tapfs_xen *tapfs_xen_new(tapfs_disk *disk, const tapfs_xen_options *options);
/* Map the next ring's pages (1 to 16, a power of two) and bind its event channel. Before start. 0 or -errno. */
int tapfs_xen_add_ring(tapfs_xen *device, const uint32_t *references, uint32_t count, uint32_t port);
/* Start the threads; what the journal holds is done again first. 0 or -errno: then only free may follow. */
int tapfs_xen_start(tapfs_xen *device);

/* Readable when a ring has ended by itself, for the frontend broke the protocol. */
int tapfs_xen_ended_fd(tapfs_xen *device);
/* What went wrong then; NULL: nothing. A static string. */
const char *tapfs_xen_problem(tapfs_xen *device);

/* Wait for parked requests and take up to `capacity`: how many, or 0 when the device is being stopped. */
size_t tapfs_xen_next_parked(tapfs_xen *device, uint32_t queue, tapfs_parked *parked, size_t capacity);
/* Try a READ or WRITE again: 0 when it is finished, else 1 and what is missing now. */
int tapfs_xen_resume_parked(tapfs_xen *device, uint64_t ticket, tapfs_parked *parked);
/* Finish a parked request with an errno or with success (0): a WRITE is written whole. */
void tapfs_xen_complete(tapfs_xen *device, uint64_t ticket, int error);

/* Take no more requests and wait until none is in flight. Parked ones must be served meanwhile. */
void tapfs_xen_pause(tapfs_xen *device);
/* While paused: serve another disk, which the caller keeps instead of the old one. */
void tapfs_xen_set_disk(tapfs_xen *device, tapfs_disk *disk, int writable, int discard);
void tapfs_xen_unpause(tapfs_xen *device);

/* Per second; 0: no limit. Any time. */
void tapfs_xen_limit(tapfs_xen *device, uint64_t bytes, uint64_t requests);

/* Pause for good and end the threads; requests that were not taken stay in the rings for a successor. */
void tapfs_xen_stop(tapfs_xen *device);
/* Stops first if need be. */
void tapfs_xen_free(tapfs_xen *device);

void tapfs_xen_counters(tapfs_xen *device, tapfs_xen_statistics *statistics);
/* What was asked for since the start; valid as long as the device is. */
const tapfs_metrics *tapfs_xen_metrics(const tapfs_xen *device);

/* cffi: end */

#endif
