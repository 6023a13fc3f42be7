/*
 * The tapfs engine: it moves the bytes of virtual disks and knows no image format.
 *
 * A disk is a chain of layers, layer 0 on top. A layer has host files and either an identity
 * mapping or a cache of map units that its owner fills (tapfs_disk_install). Requests are "try"
 * calls: they finish natively or say what is missing. The engine never calls back.
 *
 * Threads: every function but tapfs_disk_free may be called from any thread at any time; the
 * rules are in kernel/CONCURRENCY.md. Offsets and lengths are bytes; ranges are half open.
 *
 * Between the two marks below this file is also read by cffi (kernel/build_engine.py), so only
 * plain C declarations stand there.
 */
#ifndef TAPFS_ENGINE_H
#define TAPFS_ENGINE_H

#include <stddef.h>
#include <stdint.h>

/* cffi: begin */

typedef struct tapfs_disk tapfs_disk;

/* tapfs.extent.Kind */
enum { TAPFS_DATA = 0, TAPFS_ZERO = 1, TAPFS_UNALLOCATED = 2, TAPFS_COMPRESSED = 3 };

/* tapfs.driver.Codec and Cipher */
enum { TAPFS_CODEC_NONE = 0, TAPFS_CODEC_RAW_DEFLATE = 1 };
enum { TAPFS_CIPHER_NONE = 0, TAPFS_CIPHER_AES_128_CBC_SECTOR = 1 };

/* How a request ended. */
enum {
    TAPFS_DONE = 0,    /* all of it */
    TAPFS_MISS = 1,    /* the map of (layer, offset, length) is not cached: install it, retry */
    TAPFS_RESERVE = 2, /* a write needs (0, offset, length) reserved by the driver */
    TAPFS_AGAIN = 3,   /* TAPFS_NOWAIT was asked and the request would block */
    /* `error` is an errno; (layer, file, offset) is the place in the host file. EBADFD: the file has become shorter. */
    TAPFS_FAILED = 4
};

/* Request flags. */
enum {
    TAPFS_NOWAIT = 1 /* reads: answer only what the host has in memory */
};

/* Host file flags. */
enum {
    TAPFS_FILE_DIRECT = 1,  /* opened with O_DIRECT: align, bounce, fall back to buffered if refused */
    TAPFS_FILE_WRITABLE = 2
};

typedef struct {
    uint64_t offset;
    uint64_t length;
    uint64_t host_offset;
    uint64_t host_length; /* COMPRESSED only */
    uint32_t file;
    uint8_t kind;
    uint8_t in_place;
    uint16_t reserved;
} tapfs_extent;

typedef struct {
    uint64_t offset;
    uint64_t length;
    uint64_t host_offset;
    uint32_t file;
    uint8_t fresh;    /* the host range reads as zeros already (ignored under a cipher) */
    uint8_t in_place; /* no copy-on-write fill */
    uint16_t reserved;
} tapfs_placement;

typedef struct {
    int32_t status;
    int32_t error;
    uint32_t layer;
    uint32_t file;
    uint64_t done;   /* bytes from the start of the request that are finished */
    uint64_t offset; /* see the status values */
    uint64_t length;
    const char *operation; /* FAILED: a static string for the message, "read", "write", "inflate" ... */
} tapfs_outcome;

typedef struct {
    uint64_t virtual_size;
    uint64_t granule;  /* COMPRESSED extents are exactly one granule */
    uint64_t map_unit; /* multiple of granule, at most 1 GiB; ignored for identity */
    uint8_t identity;
    uint8_t codec;
    uint8_t cipher;
    uint8_t writable;      /* only ever layer 0 */
    uint8_t key[16];       /* with a cipher */
} tapfs_layer;

typedef struct {
    uint64_t cache_hits;
    uint64_t cache_misses;
    uint64_t cache_bytes;
    uint64_t bytes_read;
    uint64_t bytes_written;
} tapfs_statistics;

/* What a plan step does. tapfs.plan */
enum {
    TAPFS_STEP_WRITE = 0,
    TAPFS_STEP_GROW = 1,
    TAPFS_STEP_DISCARD = 2,
    TAPFS_STEP_BARRIER = 3,
    TAPFS_STEP_ALLOCATE = 4
};

typedef struct {
    uint32_t step;
    uint32_t file;
    uint64_t host_offset; /* GROW: the size */
    uint64_t length;
    const uint8_t *data; /* WRITE */
} tapfs_step;

/* NULL when out of memory. */
tapfs_disk *tapfs_disk_new(uint64_t cache_bytes);
/* The descriptors stay the caller's. No request may be running. */
void tapfs_disk_free(tapfs_disk *disk);

/* Add the next layer below. Returns its index or -errno. Not while requests run. */
int tapfs_disk_add_layer(tapfs_disk *disk, const tapfs_layer *layer);
/* Add the next host file of a layer. Returns its index or -errno. Not while requests run. */
int tapfs_disk_add_file(tapfs_disk *disk, uint32_t layer, int fd, uint32_t flags);

/*
 * Put the map of whole map units into the cache, replacing what was there. The extents are
 * ascending and contiguous, start at a unit boundary and end at one or at or after the end of
 * the layer. 0 or -errno (-EINVAL: the extents break a rule; nothing was installed).
 */
int tapfs_disk_install(tapfs_disk *disk, uint32_t layer, const tapfs_extent *extents, size_t count);
/*
 * Change the map of a range in the units that are cached; the others stay uncached. The extents are
 * ascending and contiguous and begin and end at granules. 0 or -errno (-EINVAL: nothing was changed).
 */
int tapfs_disk_patch(tapfs_disk *disk, uint32_t layer, const tapfs_extent *extents, size_t count);
/* Drop the units that touch the range from the cache. */
void tapfs_disk_forget(tapfs_disk *disk, uint32_t layer, uint64_t offset, uint64_t length);

/* Read from the top of the chain. Past a shorter backing layer there are zeros. */
void tapfs_read(tapfs_disk *disk, void *buffer, uint64_t offset, uint64_t length, uint32_t flags,
                tapfs_outcome *outcome);

/*
 * Write in place, as far as the map allows: `done` counts the finished prefix, RESERVE names the
 * run at its end that is not in place (clipped to the request).
 */
void tapfs_write(tapfs_disk *disk, const void *buffer, uint64_t offset, uint64_t length, uint32_t flags,
                 tapfs_outcome *outcome);

/*
 * Write [offset, offset + length) to reserved places of layer 0. The placements are ascending and
 * contiguous and cover the range; what they cover beyond it is filled with the old contents of the
 * disk (unless in_place). MISS may be answered; the caller installs and calls again from the start.
 * Nothing becomes visible in the map.
 */
void tapfs_write_reserved(tapfs_disk *disk, const void *buffer, uint64_t offset, uint64_t length,
                          const tapfs_placement *placements, size_t count, tapfs_outcome *outcome);

/*
 * Make each placement of layer 0 read as zeros: nothing where it is fresh, a punched hole where the
 * host can, written zeros otherwise. `discard`: advisory, so without a hole nothing is written and
 * nothing happens under a cipher.
 */
void tapfs_zero_placements(tapfs_disk *disk, const tapfs_placement *placements, size_t count, int discard,
                           tapfs_outcome *outcome);

/* Write a payload at a host offset of layer 0, as it is: stream writers. Encrypted when `guest_offset`
 * is not UINT64_MAX and the layer has a cipher. */
void tapfs_write_host(tapfs_disk *disk, uint32_t file, uint64_t host_offset, const void *buffer,
                      uint64_t length, uint64_t guest_offset, tapfs_outcome *outcome);

/* Execute steps of layer 0 in order; a BARRIER makes all before it durable. DISCARD is advisory. */
void tapfs_execute(tapfs_disk *disk, const tapfs_step *steps, size_t count, tapfs_outcome *outcome);

/* Make every finished write of layer 0 durable. */
void tapfs_sync(tapfs_disk *disk, tapfs_outcome *outcome);

/* Wait until every request that runs now has ended: afterwards none holds an older map. */
void tapfs_disk_quiesce(tapfs_disk *disk);

void tapfs_disk_statistics(tapfs_disk *disk, tapfs_statistics *statistics);

/* Whether the bytes are all zero. */
int tapfs_is_zero(const void *buffer, uint64_t length);
/*
 * The runs of granules that are not all zero, as (offset, length) pairs in `runs`, at most `capacity`
 * pairs; `scanned` is how far it came. The last granule may be short. Returns the number of pairs.
 */
size_t tapfs_find_data(const void *buffer, uint64_t length, uint64_t granule, uint64_t *runs,
                       size_t capacity, uint64_t *scanned);
/* The offset of the first byte that differs, or `length`. */
uint64_t tapfs_first_difference(const void *left, const void *right, uint64_t length);

/*
 * Compress `count` granules, each on its own, into `out` one after the other; sizes[i] is 0 where a
 * granule does not shrink (nothing is put into `out` for it). `out` holds count * granule bytes.
 * 0 or -errno.
 */
int tapfs_compress(uint32_t codec, const void *buffer, uint64_t granule, size_t count, void *out,
                   uint64_t *sizes);

/* cffi: end */

#endif
