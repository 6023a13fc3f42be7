/*
 * A vhost-user block device: native threads that answer a guest's virtqueues from an engine disk.
 *
 * The owner speaks the vhost-user protocol with the front end (QEMU and others), and tells this device where the guest's
 * memory and its virtqueues are. A thread for each virtqueue takes requests, checks every field, moves the data
 * between the guest's memory and the disk, and answers. A request that needs a driver (a map, a reservation, a flush)
 * is parked for the owner's threads. Offsets, lengths and sizes are bytes. docs/specs/vhost-user.md has the protocol.
 *
 * Threads: one thread at a time may change memory, the in-flight region and rings. The functions on parked requests, the
 * counters and tapfs_vhost_problem may be called from any thread between new and free.
 *
 * After a kill -9: requests that were taken and not answered stand in the in-flight region, which the front end keeps
 * (kernel/src/vhost/inflight.c). A device that is given the region does them again.
 */
#ifndef TAPFS_VHOST_H
#define TAPFS_VHOST_H

#include "serving/metrics.h"
#include "serving/serving.h"

/* cffi: begin */

typedef struct tapfs_vhost tapfs_vhost;

/* What a parked request wants. */
enum {
    TAPFS_VHOST_READ = 0,   /* what `outcome` says, then resume */
    TAPFS_VHOST_WRITE = 1,  /* likewise; or write `data` to the disk, then complete */
    TAPFS_VHOST_SYNC = 2,   /* make everything durable */
    TAPFS_VHOST_ZERO = 3,   /* make the range read as zeros, and free its space where that goes */
    TAPFS_VHOST_FILL = 4,   /* make the range read as zeros that take space */
    TAPFS_VHOST_DISCARD = 5 /* the contents of the range are not needed any more */
};

/* Virtqueues of a device, entries of one, regions of memory. */
#define TAPFS_VHOST_RINGS_MAX 64
#define TAPFS_VHOST_ENTRIES_MAX 1024
#define TAPFS_VHOST_REGIONS_MAX 509
/* The longest zeroing or discard, and the most of them in one request. */
#define TAPFS_VHOST_ZEROES_MAX 1073741824
#define TAPFS_VHOST_RANGES_MAX 32
/* A name that the guest may ask for. */
#define TAPFS_VHOST_ID_BYTES 20

/* A part of the guest's memory: `size` bytes of a file from `offset` on. */
typedef struct {
    uint64_t guest; /* its address in the guest */
    uint64_t user;  /* its address in the front end */
    uint64_t size;
    uint64_t offset;
} tapfs_vhost_region;

/* A split virtqueue. The three parts are addresses in the front end. */
typedef struct {
    uint64_t descriptors, available, used;
    uint32_t entries;
    uint32_t base;         /* the index from which requests are taken, if no in-flight region says it */
    int32_t kick, call, error; /* eventfds, or -1; they stay the caller's, which has made them not block */
    uint8_t event_index;   /* what was negotiated */
    uint8_t indirect;
    uint8_t write_through; /* an answered write is durable */
    uint8_t logs;          /* it notes in the log what it writes into the guest's memory */
    uint8_t logs_ring;     /* and into its used ring, which lies in the guest at this address */
    uint64_t used_in_guest;
} tapfs_vhost_ring;

typedef struct {
    uint64_t reads, writes, flushes, zeroes, discards; /* requests answered, whatever the answer */
    uint64_t read_bytes, written_bytes;
    uint64_t errors;        /* answered with an error */
    uint64_t parked;        /* times that a request was parked */
    uint64_t waited;        /* times that a read or write was with the host while others went on */
    uint64_t notifications; /* sent to the guest */
    uint64_t kicks;         /* times that the threads woke up */
    uint64_t redone;        /* requests of the in-flight region that a predecessor had taken */
    uint64_t throttled_ns;  /* time that requests waited for the rate limit */
} tapfs_vhost_statistics;

/* The disk stays the caller's and must outlive the device. `id` is what the guest may ask for. NULL with errno set. */
tapfs_vhost *tapfs_vhost_new(tapfs_disk *disk, uint64_t size, int writable, const char *id);
/* Serve another disk, or the same at another size. No ring is started. */
void tapfs_vhost_set_disk(tapfs_vhost *device, tapfs_disk *disk, uint64_t size, int writable);

/*
 * Map a region, beside those that there are. No ring is started. `fd` stays the caller's. 0 or -errno: -EINVAL if it
 * reaches past the end of its file or its addresses past 2^64, -EEXIST if it overlaps another one's addresses in the
 * guest, -ENOSPC if there are TAPFS_VHOST_REGIONS_MAX.
 */
int tapfs_vhost_add_region(tapfs_vhost *device, const tapfs_vhost_region *region, int fd);
/* Unmap the region with these addresses and this size. No ring is started. 0 or -ENOENT. */
int tapfs_vhost_remove_region(tapfs_vhost *device, const tapfs_vhost_region *region);
void tapfs_vhost_remove_regions(tapfs_vhost *device);

/* Bytes of an in-flight region for so many rings. */
uint64_t tapfs_vhost_inflight_size(uint32_t rings, uint32_t entries);
/* Track requests in this part of a file from now on, or (`fd` -1) nowhere. No ring is started. `fd` stays the caller's.
 * 0 or -errno. */
int tapfs_vhost_set_inflight(tapfs_vhost *device, int fd, uint64_t offset, uint64_t size, uint32_t rings,
                             uint32_t entries);

/* Note in this part of a file, a bit for each page of 4096 bytes, what rings write that are told to log; or (`fd` -1) nowhere. No
 * ring is started. `fd` stays the caller's. 0 or -errno. */
int tapfs_vhost_set_log(tapfs_vhost *device, int fd, uint64_t offset, uint64_t size);

/*
 * Serve a ring: first what the in-flight region says that a predecessor had taken. 0 or -errno: -EINVAL if a part of the
 * ring does not lie in the guest's memory, or the in-flight region is no such.
 */
int tapfs_vhost_start_ring(tapfs_vhost *device, uint32_t index, const tapfs_vhost_ring *ring);
/* Signal another eventfd (-1: none) when requests of a ring were answered. It is started or not. 0 or -errno. */
int tapfs_vhost_set_call(tapfs_vhost *device, uint32_t index, int call);
/*
 * Take no more requests, answer those that were taken, and end the thread. The index from which requests are to be taken
 * again; -ENOENT if the ring was not started. Parked requests must be served meanwhile. With `drains` those that are let go
 * of are answered with an error, in-flight region or not: nobody will look there.
 */
int64_t tapfs_vhost_stop_ring(tapfs_vhost *device, uint32_t index, int drains);

/* Take at most so many bytes and requests a second from now on, from all rings together; 0: no limit. For who starts rings. */
void tapfs_vhost_limit(tapfs_vhost *device, uint64_t bytes, uint64_t requests);

/* A descriptor that becomes readable when a ring has met a problem. Reading it is the caller's. */
int tapfs_vhost_problem_fd(tapfs_vhost *device);
/* How a ring broke the protocol since it was started last, a static string; NULL: it did not. It takes no requests
 * then. */
const char *tapfs_vhost_problem(tapfs_vhost *device, uint32_t index);

/* Wait for parked requests and take up to `capacity`: how many, or 0 when the device is being stopped. */
size_t tapfs_vhost_next_parked(tapfs_vhost *device, uint32_t queue, tapfs_parked *parked, size_t capacity);
/* Give a READ or WRITE back to its ring, which tries again: 0. */
int tapfs_vhost_resume_parked(tapfs_vhost *device, uint64_t ticket, tapfs_parked *parked);
/* Finish a parked request with an errno or with success (0): a WRITE is written whole. */
void tapfs_vhost_complete(tapfs_vhost *device, uint64_t ticket, int error);
/*
 * Let go of a parked request whose ring is being stopped: 1. It has no answer, and stands in the in-flight region for who
 * starts the ring again; without such a region it is answered with an error. 0: its ring goes on, and nothing was done.
 */
int tapfs_vhost_leave_parked(tapfs_vhost *device, uint64_t ticket);

/* Have the owner's threads end. No ring is started. */
void tapfs_vhost_stop(tapfs_vhost *device);
/* Stops first if need be. Nobody may have a parked request in hand. */
void tapfs_vhost_free(tapfs_vhost *device);

void tapfs_vhost_counters(tapfs_vhost *device, tapfs_vhost_statistics *statistics);
/* What was asked for since the start; valid as long as the device is. */
const tapfs_metrics *tapfs_vhost_metrics(const tapfs_vhost *device);

/* cffi: end */

#endif
