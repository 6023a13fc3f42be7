/*
 * A block device of Linux' ublk driver (/dev/ublkbN): native threads that answer its requests from an engine disk.
 *
 * One tapfs_ublk is one device with one or more queues. A thread for each queue fetches requests from the driver by
 * io_uring, moves the data, commits the results. A request that needs a driver of a format (a map, a reservation) or the
 * host's disk (flush, discard) is parked for the owner's threads. docs/specs/ublk.md has the kernel's interface.
 *
 * After a crash: the kernel keeps every request that was fetched and not committed, and gives it to the next process.
 */
#ifndef TAPFS_UBLK_H
#define TAPFS_UBLK_H

#include "serving/metrics.h"
#include "serving/serving.h"

/* cffi: begin */

typedef struct tapfs_ublk tapfs_ublk;

/*
 * What a parked request wants: a READ or WRITE what `outcome` says, then resume; or a WRITE that `data` is written, then
 * complete. A SYNC that everything becomes durable. The answer of a write must outlive this process: who completes it, or
 * reserves for it, sees to that (tapfs/disk/plan_log.py).
 */
enum {
    TAPFS_UBLK_READ = 0,
    TAPFS_UBLK_WRITE = 1,
    TAPFS_UBLK_SYNC = 2,
    TAPFS_UBLK_DISCARD = 3,
    TAPFS_UBLK_ZERO = 4, /* read as zeros, and free the space where that goes */
    TAPFS_UBLK_FILL = 5  /* read as zeros that take space */
};

typedef struct {
    int32_t device;    /* the character device of the driver, open; stays the caller's until free */
    int32_t simulated; /* -1, or instead of `device` a file in memory that tests play the driver in (ublk/simulated.c) */
    uint32_t queues;   /* as the driver has them, 1 to 64 */
    uint32_t depth;    /* requests of a queue, up to 4096 */
    uint32_t max_bytes; /* of a read or write */
    uint32_t workers;   /* threads of each queue for what blocks */
    uint8_t writable;  /* else everything but reads and flushes is refused */
    uint8_t io_uring;  /* use it for the host's files, too, where the kernel has it */
    uint8_t zero_copy; /* the device gives the pages of its requests to the rings of its queues, and copies nothing itself */
    uint8_t reserved[5];
} tapfs_ublk_options;

typedef struct {
    uint64_t reads, writes, flushes, discards, zeroes; /* requests answered, whatever the answer */
    uint64_t read_bytes, written_bytes;                /* of those that succeeded */
    uint64_t errors;
    uint64_t parked;
    uint64_t at_once;      /* moved by the queue's thread without waiting */
    uint64_t passed;       /* moved by the kernel between the file and the pages of the request */
    uint64_t batches;      /* times that a queue's thread has asked the driver for more */
    uint64_t throttled_ns; /* time that requests waited for the rate limit */
    uint64_t in_flight;
} tapfs_ublk_statistics;

/* NULL with errno set. The disk stays the caller's and must outlive it. */
tapfs_ublk *tapfs_ublk_new(tapfs_disk *disk, const tapfs_ublk_options *options);
/* Start the threads. When it returns 0 every queue waits for requests, so the driver may start the device, or end its
 * recovery. Otherwise -errno: only free may follow. */
int tapfs_ublk_start(tapfs_ublk *server);

/* Readable when the driver has taken the device from us: it was stopped, or a queue does not work. */
int tapfs_ublk_ended_fd(tapfs_ublk *server);
/* The errno of a queue that does not work; 0: none. */
int tapfs_ublk_problem(tapfs_ublk *server);

/* Wait for parked requests and take up to `capacity`: how many, or 0 when the server is being stopped. */
size_t tapfs_ublk_next_parked(tapfs_ublk *server, uint32_t queue, tapfs_parked *parked, size_t capacity);
/* Try a READ or WRITE again: 0 when it is done with, else 1 and what is missing now. */
int tapfs_ublk_resume_parked(tapfs_ublk *server, uint64_t ticket, tapfs_parked *parked);
/* Finish a parked request with an errno or with success (0): a WRITE is written whole. */
void tapfs_ublk_complete(tapfs_ublk *server, uint64_t ticket, int error);

/* Begin no more requests and wait until none is in flight. Parked ones must be served meanwhile. */
void tapfs_ublk_pause(tapfs_ublk *server);
/* While paused: serve another disk, which the caller keeps instead of the old one. */
void tapfs_ublk_set_disk(tapfs_ublk *server, tapfs_disk *disk, int writable);
void tapfs_ublk_unpause(tapfs_ublk *server);

/* Per second; 0: no limit. Any time. */
void tapfs_ublk_limit(tapfs_ublk *server, uint64_t bytes, uint64_t requests);

/* Pause for good and end the threads. What was fetched and not begun is the driver's again, for a successor. */
void tapfs_ublk_stop(tapfs_ublk *server);
/* Stops first if need be. */
void tapfs_ublk_free(tapfs_ublk *server);

void tapfs_ublk_counters(tapfs_ublk *server, tapfs_ublk_statistics *statistics);
/* What was asked for since the start; valid as long as the server is. */
const tapfs_metrics *tapfs_ublk_metrics(const tapfs_ublk *server);

/* One command for the driver's control device, which is open as `control`: its encoded number, the device, a buffer and
 * a number that it may need. Waits for the answer: 0 or more, or -errno. */
int tapfs_ublk_control(int control, uint32_t command, uint32_t device, void *buffer, uint16_t length, uint64_t data);

/* cffi: end */

#endif
