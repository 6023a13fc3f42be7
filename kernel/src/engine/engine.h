/*
 * The tapfs engine: it moves the bytes of virtual disks and knows no image format.
 *
 * A disk is a chain of layers, layer 0 on top. A layer has host files and either an identity
 * mapping or a cache of map units that its owner fills (tapfs_disk_install). Requests are "try"
 * calls: they finish natively or say what is missing. The engine never calls back.
 *
 * Threads: every function but tapfs_disk_free may be called from any thread at any time; the
 * rules are in kernel/src/engine/CONCURRENCY.md. Offsets and lengths are bytes; ranges are half open.
 *
 * Between the two marks below this file is also read by cffi (kernel/build_engine.py), so only
 * plain C declarations stand there.
 */
#ifndef TAPFS_ENGINE_H
#define TAPFS_ENGINE_H

#include <stddef.h>
#include <stdint.h>

#include "engine/table_layout.h"

/* cffi: begin */

typedef struct tapfs_disk tapfs_disk;

/* tapfs.extent.Kind. BROKEN is only installed: a request that comes there ends with MISS, and the owner says why. */
enum { TAPFS_DATA = 0, TAPFS_ZERO = 1, TAPFS_UNALLOCATED = 2, TAPFS_COMPRESSED = 3, TAPFS_BROKEN = 4 };

/* tapfs.geometry.Codec; tapfs.ciphers: CipherAlgorithm, CipherMode and InitialVector */
enum {
    TAPFS_CODEC_NONE = 0,
    TAPFS_CODEC_RAW_DEFLATE = 1,
    TAPFS_CODEC_ZLIB = 2,
    TAPFS_CODEC_ZSTD = 3,
    TAPFS_CODEC_BZIP2 = 4, /* unpacking only, as those after it */
    TAPFS_CODEC_LZMA = 5,  /* a stream of the .xz format */
    TAPFS_CODEC_LZFSE = 6,
    TAPFS_CODEC_ADC = 7
};
enum {
    TAPFS_CIPHER_NONE = 0,
    TAPFS_CIPHER_AES = 1,
    TAPFS_CIPHER_SERPENT = 2, /* this and those after it are libnettle's: tapfs_cipher_library */
    TAPFS_CIPHER_TWOFISH = 3,
    TAPFS_CIPHER_CAST5 = 4
};
enum { TAPFS_CIPHER_ECB = 1, TAPFS_CIPHER_CBC = 2, TAPFS_CIPHER_CTR = 3, TAPFS_CIPHER_XTS = 4 };
enum {
    TAPFS_IV_NONE = 0,    /* only with ECB */
    TAPFS_IV_PLAIN = 1,   /* the low 32 bits of the number of the sector, little endian */
    TAPFS_IV_PLAIN64 = 2, /* all 64 bits */
    TAPFS_IV_ESSIV = 3    /* the 64 bits, encrypted under a digest of the key */
};

/* How a request ended. */
enum {
    TAPFS_DONE = 0,    /* all of it */
    TAPFS_MISS = 1,    /* the map of (layer, offset, length) is not cached: install it, retry */
    TAPFS_RESERVE = 2, /* a write needs (0, offset, length) reserved by the driver */
    TAPFS_AGAIN = 3,   /* TAPFS_NOWAIT: the host would have to be waited for (`error` is EAGAIN), or it cannot be asked
                        * whether it would (EOPNOTSUPP: O_DIRECT, a cipher, a host that knows no RWF_NOWAIT) */
    /* `error` is an errno; (layer, file, offset) is the place in the host file. EBADFD: the file has become shorter. */
    TAPFS_FAILED = 4,
    /* [offset, offset + length) of host file (layer, file) is not here: fetch it, retry */
    TAPFS_FETCH = 5
};

/* Request flags. */
enum {
    TAPFS_NOWAIT = 1 /* read and write in place only what the host gives and takes without waiting */
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
    uint32_t skip; /* COMPRESSED, own_units: bytes of the unpacked payload before the extent */
    uint8_t kind;
    uint8_t in_place;
    uint16_t depth; /* in merged maps, inside the engine: the layer that gives it; else 0 */
    uint16_t reserved[2];
} tapfs_extent;

/* A run of the disk and the layer that gives it. tapfs.disk.chain_map.MappedExtent */
typedef struct {
    uint64_t offset;
    uint64_t length;
    uint64_t host_offset; /* where the bytes stand as they are read, or the hole is; only if placed */
    uint32_t layer;
    uint32_t file;
    uint8_t kind;
    uint8_t placed;
    uint16_t reserved[3];
} tapfs_mapped;

typedef struct {
    uint64_t offset;
    uint64_t length;
    uint64_t host_offset;
    uint32_t file;
    uint8_t fresh;    /* the host range reads as zeros already (ignored under a cipher) */
    uint8_t in_place; /* no copy-on-write fill */
    uint16_t reserved;
} tapfs_placement;

/* [offset, offset + length) of the disk. tapfs.extent.Range */
typedef struct {
    uint64_t offset;
    uint64_t length;
} tapfs_range;

/* Bytes to be written to [offset, offset + length) of the disk. Segments ascend and do not overlap. */
typedef struct {
    uint64_t offset;
    uint64_t length;
    const uint8_t *data;
} tapfs_segment;

typedef struct {
    int32_t status;
    int32_t error;
    uint32_t layer;
    uint32_t file;
    uint64_t done;   /* bytes from the start of the request that are finished */
    uint64_t offset; /* see the status values */
    uint64_t length;
    const char *operation; /* FAILED: a static string for the message, "read", "write", "unpack" ... */
} tapfs_outcome;

/* How DATA is encrypted, sector by sector. tapfs.ciphers.Cipher */
typedef struct {
    uint8_t algorithm;
    uint8_t mode;
    uint8_t iv;
    uint8_t iv_from_host; /* the number counts host offsets, not guest offsets */
    uint32_t key_bytes;
    uint32_t sector_bytes; /* a power of two, 512 to 4096 */
    uint32_t iv_bytes;     /* the number of a sector is (offset - iv_offset) / iv_bytes, modulo 2^64 */
    uint64_t iv_offset;
    char iv_digest[16]; /* ESSIV: the name of the digest, ended by a zero */
    uint8_t key[64];
} tapfs_cipher;

/* How payloads are packed. tapfs.geometry.Packing */
typedef struct {
    uint8_t codec;
    uint8_t length_bytes; /* of the length field in the payload's header, little endian: 0 (no header), 4 or 8 */
    uint16_t length_at;   /* where that field is in the header */
    uint32_t header_bytes; /* before the packed bytes; with a header host_length is a bound */
    uint32_t own_units;    /* payloads unpack to lengths of their own, at most packed_unit; only in a layer that is read */
} tapfs_packing;

typedef struct {
    uint64_t virtual_size;
    uint64_t granule;     /* the smallest piece that is mapped or reserved */
    uint64_t packed_unit; /* what a payload unpacks to: a multiple of granule (0: one); a COMPRESSED extent is a part */
    uint64_t map_unit;    /* multiple of granule and (without own_units) packed_unit, at most 1 GiB; not for identity */
    uint64_t identity_offset;
    uint32_t identity_file; /* identity: byte i of the disk is byte identity_offset + i of this file */
    uint8_t identity;
    uint8_t writable; /* only ever layer 0 */
    uint16_t reserved;
    tapfs_packing packing;
    tapfs_cipher cipher;
} tapfs_layer;

typedef struct {
    uint64_t cache_hits;
    uint64_t cache_misses;
    uint64_t cache_fills; /* units that were read from the format's tables, without their owner */
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
    TAPFS_STEP_ALLOCATE = 4,
    TAPFS_STEP_COPY = 5,
    TAPFS_STEP_SHORTEN = 6
};

typedef struct {
    uint32_t step;
    uint32_t file;
    uint64_t host_offset; /* GROW, SHORTEN: the size */
    uint64_t length;
    const uint8_t *data; /* WRITE */
    uint64_t source;     /* COPY: from where in the same file */
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
 * Change the map of ranges in the units that are cached; the others stay uncached. The extents are ascending and
 * disjoint, and where one does not continue the one before there is a gap from granule to granule. 0 or -errno
 * (-EINVAL: nothing was changed).
 */
int tapfs_disk_patch(tapfs_disk *disk, uint32_t layer, const tapfs_extent *extents, size_t count);
/* Drop the units that touch the range from the cache. */
void tapfs_disk_forget(tapfs_disk *disk, uint32_t layer, uint64_t offset, uint64_t length);

/*
 * Have the engine read the maps of a layer from its tables: the place of each map unit's table is a host offset,
 * TAPFS_TABLE_ABSENT (the unit is of absent_kind) or TAPFS_TABLE_ASK (its owner knows more than the disk). An entry
 * that the layout does not allow makes its unit a MISS, so the owner says what is wrong with it.
 * 0 or -errno (-EINVAL: the layout breaks a rule). Not while requests run.
 */
int tapfs_disk_set_tables(tapfs_disk *disk, uint32_t layer, const tapfs_table *layout, const uint64_t *places,
                          size_t count);
/*
 * The places of the tables of units [first, first + count) from now on. Patching and forgetting make a place ASK; the
 * owner sets it again once the table is durable and says the same. `host_size` replaces the layout's.
 */
int tapfs_disk_set_places(tapfs_disk *disk, uint32_t layer, uint64_t first, const uint64_t *places, size_t count,
                          uint64_t host_size);
/*
 * From now on a write in place over one of these ranges and places of a file of layer 0 ends with RESERVE, as if the map
 * did not allow it. Both ascend, the ranges do not overlap, and a place is `size` bytes long. What began before has ended
 * when the next quiesce returns. 0 or -errno.
 */
int tapfs_disk_guard(tapfs_disk *disk, uint32_t file, const tapfs_range *ranges, size_t range_count,
                     const uint64_t *places, size_t count, uint64_t size);

/*
 * Of a file that is only read not every block is here: present[i] is 0 where block i is not. The bytes stay the
 * caller's and outlive the disk; the caller writes a block into the file, then sets its byte. 0 or -errno (-EINVAL: the
 * file is writable). Not while requests run.
 */
int tapfs_disk_set_presence(tapfs_disk *disk, uint32_t layer, uint32_t file, uint64_t block_bytes,
                            const uint8_t *present, uint64_t blocks);

/*
 * A file that is only read, without O_DIRECT, is `length` bytes from `start` on of what its descriptor names, as a member of
 * an archive is. All offsets in the file count from there, but for the blocks of tapfs_disk_set_presence. 0 or -errno.
 * Not while requests run.
 */
int tapfs_disk_set_window(tapfs_disk *disk, uint32_t layer, uint32_t file, uint64_t start, uint64_t length);

/*
 * Answer every write in place with RESERVE until it is unsealed: something must become true of the image before its
 * first change, and the owner has to see to that.
 */
void tapfs_disk_seal(tapfs_disk *disk, int sealed);

/* Read from the top of the chain. Past a shorter backing layer there are zeros. */
void tapfs_read(tapfs_disk *disk, void *buffer, uint64_t offset, uint64_t length, uint32_t flags,
                tapfs_outcome *outcome);

/*
 * The map of the chain as at most `capacity` runs, merged; holes of raw files are ZERO. The first `count` are there
 * already, and the last of them is merged with the next one. It ends early (DONE with `done` below `length`) where there
 * is no more room or after so many looks at the map, and with a MISS. The number of runs.
 */
size_t tapfs_map(tapfs_disk *disk, uint64_t offset, uint64_t length, uint64_t lookups, tapfs_mapped *runs,
                 size_t count, size_t capacity, tapfs_outcome *outcome);

/*
 * The same, and runs of zeros are parted by the places that their entries keep; they are placed there. Tables are read
 * for it once more, because the cache has runs without these places. Of what is not flushed no such place is known.
 */
size_t tapfs_map_places(tapfs_disk *disk, uint64_t offset, uint64_t length, uint64_t lookups, tapfs_mapped *runs,
                        size_t count, size_t capacity, tapfs_outcome *outcome);

/*
 * The ranges of the disk that are not known to be zeros, as DATA and COMPRESSED runs give them. Gaps of up to `gap` bytes
 * join two of them; each is widened to multiples of `align` bytes, which may take the last one past the end of the disk. It
 * ends early (DONE with `done` below `length`) after `capacity` ranges, after ranges of `bytes` in all, or after so many
 * looks at the map, and with a MISS. Then `done` is where the next call goes on: no range reaches past it. `bytes` is
 * a multiple of `align`. The number of ranges.
 */
size_t tapfs_data_ranges(tapfs_disk *disk, uint64_t offset, uint64_t length, uint64_t gap, uint64_t align,
                         uint64_t bytes, uint64_t lookups, tapfs_range *ranges, size_t capacity,
                         tapfs_outcome *outcome);
/*
 * Have a plain disk share the bytes of ranges with another disk, where one file system has the files of both and can do
 * that. 0, or the errno for which a part of it may be as it was: then the bytes are to be read and written.
 */
int tapfs_clone_ranges(tapfs_disk *target, tapfs_disk *source, const tapfs_range *ranges, size_t count);
/* What two lists of ascending ranges cover before `end`, as at most left_count + right_count ranges. Their number. */
size_t tapfs_union_ranges(const tapfs_range *left, size_t left_count, const tapfs_range *right, size_t right_count,
                          uint64_t end, tapfs_range *ranges);

/*
 * Read ranges of the disk into a buffer, one behind the other, all but the first `from` bytes of it. `done` counts the
 * bytes of the buffer that are read then, those included. What lies past the end of the disk reads as zeros.
 */
void tapfs_read_ranges(tapfs_disk *disk, const tapfs_range *ranges, size_t count, uint64_t from, void *buffer,
                       tapfs_outcome *outcome);

/*
 * Write in place, as far as the map allows: `done` counts the finished prefix, RESERVE names the
 * run at its end that is not in place (clipped to the request).
 */
void tapfs_write(tapfs_disk *disk, const void *buffer, uint64_t offset, uint64_t length, uint32_t flags,
                 tapfs_outcome *outcome);

/*
 * Write segments in place, all but the first `from` bytes of them, as far as the map allows. The granules that hold what
 * is not in place are put into `gaps`, which has `gap_count` ranges already and room for `capacity`; the new number is
 * returned. They ascend, and no two touch. `done` counts the bytes of all segments up to where it came: to the end, to
 * a MISS, or to a gap for which there is no room.
 */
size_t tapfs_write_segments(tapfs_disk *disk, const tapfs_segment *segments, size_t count, uint64_t from,
                            tapfs_range *gaps, size_t gap_count, size_t capacity, tapfs_outcome *outcome);

/*
 * Write what segments have in reserved places of layer 0. The placements ascend, do not overlap, and cover the ranges.
 * What they cover beyond the segments is filled with the old contents of the disk (unless in_place). `from` placements
 * are done already, `done` placements are then. MISS may be answered; the caller installs and calls again from `done`.
 * Nothing becomes visible in the map.
 */
void tapfs_write_reserved(tapfs_disk *disk, const tapfs_segment *segments, size_t segment_count,
                          const tapfs_range *ranges, size_t range_count, const tapfs_placement *placements, size_t count,
                          size_t from, tapfs_outcome *outcome);

/*
 * Make each placement of layer 0 read as zeros: nothing where it is fresh, a punched hole where the
 * host can, written zeros otherwise. `discard`: advisory, so without a hole nothing is written and
 * nothing happens under a cipher.
 */
void tapfs_zero_placements(tapfs_disk *disk, const tapfs_placement *placements, size_t count, int discard,
                           tapfs_outcome *outcome);

/* A range of a host file of layer 0. */
typedef struct {
    uint64_t host_offset, length;
    uint32_t file;
    uint8_t unused; /* zeros may be written there */
} tapfs_space;

/*
 * Take space on the host for ranges of layer 0, up to the first for which there is none. What they read as does not
 * change, but that zeros may be written to what is unused. A host that cannot set space aside is no error.
 */
void tapfs_take_space(tapfs_disk *disk, const tapfs_space *spaces, size_t count, tapfs_outcome *outcome);

/* Write a payload at a host offset of layer 0, as it is: stream writers. Encrypted when `guest_offset`
 * is not UINT64_MAX and the layer has a cipher. */
void tapfs_write_host(tapfs_disk *disk, uint32_t file, uint64_t host_offset, const void *buffer,
                      uint64_t length, uint64_t guest_offset, tapfs_outcome *outcome);

/* Execute steps of layer 0 in order; a BARRIER makes all before it durable. DISCARD is advisory. */
void tapfs_execute(tapfs_disk *disk, const tapfs_step *steps, size_t count, tapfs_outcome *outcome);

/* Make every finished write of layer 0 durable. */
void tapfs_sync(tapfs_disk *disk, tapfs_outcome *outcome);

/* Have the host begin to write what it holds in memory of layer 0's files. Nothing is durable for it. It may wait for
 * the host. */
void tapfs_start_writeback(tapfs_disk *disk);
/* The same of a range of a plain disk. */
void tapfs_start_writeback_of(tapfs_disk *disk, uint64_t offset, uint64_t length);

/*
 * From now on mark what is written, in units of the disk; earlier marks are gone. A write in place, a zeroing of placements
 * and tapfs_disk_note_written set marks, all when the bytes are there. The owner notes each commit, for tapfs_write_reserved
 * sets none. The unit stays the same for the life of the disk. 0 or -errno.
 */
int tapfs_disk_track(tapfs_disk *disk, uint64_t unit);
/* Set no more marks. */
void tapfs_disk_untrack(tapfs_disk *disk);
void tapfs_disk_note_written(tapfs_disk *disk, uint64_t offset, uint64_t length);
/* The bytes of the units that are marked. */
uint64_t tapfs_disk_written(const tapfs_disk *disk);
/* Take the first marks away and give them as at most `capacity` ascending ranges. Their number. What is read of them after
 * this call has at least the write that set the mark. */
size_t tapfs_disk_take_written(tapfs_disk *disk, tapfs_range *ranges, size_t capacity);

/* Wait until every request that runs now has ended: afterwards none holds an older map. */
void tapfs_disk_quiesce(tapfs_disk *disk);

void tapfs_disk_statistics(tapfs_disk *disk, tapfs_statistics *statistics);

/* cffi: end */

#endif
