/*
 * Types and functions that the files of the engine share. engine/engine.h is the interface.
 * kernel/src/engine/CONCURRENCY.md has the rules of the locks.
 */
#ifndef TAPFS_INTERNAL_H
#define TAPFS_INTERNAL_H

#include "engine/bytes.h"
#include "engine/probes.h"
#include "host/host.h"

/* The unit of a cipher is a sector, of which these are the smallest and the largest. */
#define CIPHER_SECTOR_MIN 512u
#define CIPHER_SECTOR_MAX 4096u
/* A chain is walked by recursion, so its depth is bounded. */
#define LAYERS_MAX 256u
#define MAP_UNIT_MAX (1u << 30)
/* The largest unit of a payload that has a length of its own: it is unpacked as a whole for each part of it. */
#define OWN_UNIT_MAX (64u << 20)

/* ---- engine/cache.c: the maps of whole map units */

struct unit;

struct unit_order {
    struct unit *newest, *oldest;
    uint64_t bytes;
};

struct cache {
    pthread_mutex_t mutex;
    struct unit **buckets;
    size_t bucket_count;
    size_t unit_count;
    size_t least_units; /* kept whatever they weigh, so that a retry makes progress */
    uint64_t limit;
    uint64_t clock; /* units that were inserted */
    uint64_t hits;
    uint64_t misses;
    uint64_t filled;             /* units that were read from the format's tables here */
    struct unit_order orders[2]; /* by last use: not proven, proven */
    _Atomic uint64_t taken;      /* bytes of all units, for those who do not have the mutex */
};

TAPFS_INTERNAL int cache_init(struct cache *cache, uint64_t limit);
TAPFS_INTERNAL void cache_destroy(struct cache *cache);
/*
 * The runs of [offset, offset + length) as far as the unit of `offset` and `capacity` go, clipped to
 * the range (a COMPRESSED run keeps its payload). 0: the unit is not cached.
 */
TAPFS_INTERNAL size_t cache_lookup(struct cache *cache, uint32_t layer, uint64_t map_unit, uint64_t offset,
                                   uint64_t length, tapfs_extent *runs, size_t capacity);
/* The same, but what is not cached is not counted as a miss; `known`: the unit is there, though it may have no runs. */
TAPFS_INTERNAL size_t cache_lookup_known(struct cache *cache, uint32_t layer, uint64_t map_unit, uint64_t offset,
                                         uint64_t length, tapfs_extent *runs, size_t capacity, bool *known);
/* Whether a unit is cached; nothing is counted. */
TAPFS_INTERNAL bool cache_has(struct cache *cache, uint32_t layer, uint64_t index);
/* The extents have been checked. 0 or -ENOMEM. */
TAPFS_INTERNAL int cache_install(struct cache *cache, uint32_t layer, uint64_t map_unit, uint64_t virtual_size,
                                 const tapfs_extent *extents, size_t count);
TAPFS_INTERNAL uint64_t cache_bytes(const struct cache *cache);
/* The next three are called with the mutex held. Take a unit over, in place of the one that was there. */
TAPFS_INTERNAL void cache_insert(struct cache *cache, struct unit *unit);
/* Replace the map of the range of the (checked) extents in the units that are cached. */
TAPFS_INTERNAL void cache_patch(struct cache *cache, uint32_t layer, uint64_t map_unit, const tapfs_extent *extents,
                                size_t count);
/* Drop the units [first, last]. */
TAPFS_INTERNAL void cache_forget(struct cache *cache, uint32_t layer, uint64_t first, uint64_t last);
/* The largest values that a packed COMPRESSED run holds. */
#define COMPRESSED_LENGTH_MAX ((1u << 22) - 1)
#define COMPRESSED_FILE_MAX ((1u << 10) - 1)

/* ---- engine/tables.c, engine/table_fill.c: maps read from the tables of the format */

struct table;

TAPFS_INTERNAL void table_free(struct table *table);
/* What the cache has of units [first, last] is about to be changed, with the mutex of the cache held: their tables are
 * not read again before the owner says where they are. */
TAPFS_INTERNAL void table_changed(struct table *table, uint64_t first, uint64_t last);
/* Read the table of the unit of `offset`, and perhaps those of its neighbours, into the cache. The rest as map_lookup. */
TAPFS_INTERNAL int table_fill(tapfs_disk *disk, uint32_t layer, uint64_t offset, uint64_t length, bool nowait,
                              tapfs_extent *runs, size_t capacity, size_t *count);

/* ---- engine/map.c: one layer's map, from the cache or the tables */

enum { MAP_FOUND, MAP_MISSING, MAP_WOULD_BLOCK };

/*
 * The runs of [offset, offset + length) of a layer without identity, as far as the map unit of `offset` and `capacity`
 * go, clipped to the range (a COMPRESSED run keeps its payload). MISSING: the owner is to be asked. WOULD_BLOCK, with
 * `nowait` only: a table is not in the host's memory.
 */
TAPFS_INTERNAL int map_lookup(tapfs_disk *disk, uint32_t layer, uint64_t offset, uint64_t length, bool nowait,
                              tapfs_extent *runs, size_t capacity, size_t *count);

/* ---- engine/cipher.c. In place; whole sectors; 0 or an errno. */

struct cipher;

TAPFS_INTERNAL bool cipher_valid(const tapfs_cipher *spec);
/* NULL: errno is ENOMEM, or EOPNOTSUPP where a library lacks the cipher, or a digest for ESSIV gives no key of it. */
TAPFS_INTERNAL struct cipher *cipher_new(const tapfs_cipher *spec);
TAPFS_INTERNAL void cipher_free(struct cipher *cipher);
TAPFS_INTERNAL int cipher_apply(struct cipher *cipher, bool encrypt, uint8_t *buffer, uint64_t guest, uint64_t host,
                                uint64_t length);

/* ---- engine/codecs.c: deflate, zlib, zstd */

/* What unpacks, for one thread at a time; made when first needed. */
struct unpackers {
    struct libdeflate_decompressor *deflate;
    struct ZSTD_DCtx_s *zstd;
};

/* Whether there is such a codec, and its library is loaded if it has one. */
TAPFS_INTERNAL bool codec_known(uint32_t codec);
TAPFS_INTERNAL void unpackers_free(struct unpackers *unpackers);
/*
 * `unit` bytes out of the beginning of a payload, of which it has `produced`, at least `least`; the others are zeros.
 * 0, EUCLEAN (no valid stream, or too short a one) or ENOMEM.
 */
TAPFS_INTERNAL int unpackers_unpack(struct unpackers *unpackers, uint32_t codec, const uint8_t *payload,
                                    uint64_t length, uint8_t *out, uint64_t unit, uint64_t least,
                                    uint64_t *produced);

/* ---- engine/codec_libraries.c: functions as codecs.c has them */

TAPFS_INTERNAL bool codec_library_loaded(uint32_t codec);
TAPFS_INTERNAL int unpack_bzip2(struct unpackers *unpackers, const uint8_t *payload, uint64_t length, uint8_t *out,
                                uint64_t unit, size_t *produced);
TAPFS_INTERNAL int unpack_lzma(struct unpackers *unpackers, const uint8_t *payload, uint64_t length, uint8_t *out,
                               uint64_t unit, size_t *produced);
TAPFS_INTERNAL int unpack_lzfse(struct unpackers *unpackers, const uint8_t *payload, uint64_t length, uint8_t *out,
                                uint64_t unit, size_t *produced);
TAPFS_INTERNAL int unpack_adc(struct unpackers *unpackers, const uint8_t *payload, uint64_t length, uint8_t *out,
                              uint64_t unit, size_t *produced);

/* ---- engine/unpacked.c */

#define UNPACKED_BUCKET_BITS 10

struct codec_source;

/* The newest unit stays, however large it is. There are no buckets before the first one. */
struct unpacked_units {
    pthread_mutex_t mutex; /* of all below; a leaf */
    struct unpacked **buckets;
    struct unpacked *newest, *oldest;
    _Atomic uint64_t bytes; /* changed with the mutex */
    uint64_t own;           /* what they may always take; more is what the map leaves of its bound */
    const struct cache *map;
};

TAPFS_INTERNAL void unpacked_init(struct unpacked_units *units, uint64_t own, const struct cache *map);
TAPFS_INTERNAL void unpacked_destroy(struct unpacked_units *units);
/* Copy bytes [inner, inner + length) of a unit, if it is kept. */
TAPFS_INTERNAL bool unpacked_copy(struct unpacked_units *units, const struct codec_source *source, uint8_t *buffer,
                                  uint64_t inner, uint64_t length);
/* Memory for a unit that is to be unpacked, perhaps that of one which goes for it: fresh pages cost as much as a fast codec. */
TAPFS_INTERNAL uint8_t *unpacked_memory(struct unpacked_units *units, uint64_t unit);
/* Keep a unit, of which the first `end` bytes may be taken. `data` is the keeper's from then on. */
TAPFS_INTERNAL void unpacked_keep(struct unpacked_units *units, const struct codec_source *source, uint8_t *data,
                                  uint64_t end);
TAPFS_INTERNAL void unpacked_drop_layer(struct unpacked_units *units, uint32_t layer);
/* Let go of what there is no room for any more: the map has grown. The mutex of the cache is not held. */
TAPFS_INTERNAL void unpacked_shrink(struct unpacked_units *units);

/* ---- engine/codec.c */

#define CODEC_CONTEXTS 8

struct codec {
    pthread_mutex_t mutex;
    struct unpacked_units units;
    struct codec_context *contexts[CODEC_CONTEXTS];
    size_t context_count;
};

struct codec_source {
    struct host_file *file;
    uint32_t layer_index, file_index;
    uint64_t host_offset, host_length;
    uint64_t unit;  /* what the payload unpacks to, with own_units at most */
    uint64_t least; /* bytes of it that the payload must have */
    const tapfs_packing *packing;
    bool nowait;
};

/* Whether the codec is known and a header holds its length field. */
TAPFS_INTERNAL bool packing_valid(const tapfs_packing *packing);
/* Unpacked units are kept in `own` bytes, and in what the map leaves of its bound. */
TAPFS_INTERNAL void codec_init(struct codec *codec, uint64_t own, const struct cache *map);
TAPFS_INTERNAL void codec_destroy(struct codec *codec);
/* Bytes [inner, inner + length) of an unpacked unit. 0 or an errno, EUCLEAN: no valid stream. */
TAPFS_INTERNAL int codec_read(struct codec *codec, const struct codec_source *source, uint8_t *buffer,
                              uint64_t inner, uint64_t length);
TAPFS_INTERNAL void codec_drop_layer(struct codec *codec, uint32_t layer);

/* ---- engine/disk.c */

/* Ranges of a host file, and places of one size in it, both ascending, over which no guest data is written in place. */
struct guard {
    pthread_rwlock_t lock; /* of all below but `used`; a leaf */
    tapfs_range *ranges;
    uint64_t *places;
    size_t range_count, count;
    uint64_t size;
    uint32_t file;
    atomic_bool used;
};

struct layer {
    tapfs_layer geometry;
    struct host_file **files;
    uint32_t file_count;
    struct cipher *cipher;
    struct table *table; /* NULL: the map of every unit is the owner's to give */
    uint64_t cached_unit; /* bytes of the disk in a unit of the cache: a map unit, or a piece of one with a large table */
    struct guard guard;
};

/* Changes of maps are counted in this many classes of merged units. */
#define MERGED_STAMPS 256u

struct tapfs_disk {
    struct layer **layers;
    uint32_t layer_count;
    struct cache cache;
    uint64_t merged_unit; /* bytes; 0: nothing is merged */
    _Atomic uint64_t merged_stamps[MERGED_STAMPS];
    struct codec codec;
    struct range_lock ranges;
    _Atomic uint64_t epoch;
    _Atomic uint64_t running[2]; /* requests by the parity of the epoch they began in */
    atomic_bool quiescing;
    pthread_mutex_t quiesce_lock; /* one quiesce at a time */
    pthread_mutex_t drain_lock;
    pthread_cond_t drained;
    _Atomic uint64_t bytes_read;
    _Atomic uint64_t bytes_written;
    atomic_bool sealed; /* no write in place is let in */
    _Atomic(struct written *) written; /* NULL: nobody has asked for the marks of writes */
};

/* A running request. Functions that take one return 0, or -1 after they have filled the outcome. */
struct request {
    tapfs_disk *disk;
    tapfs_outcome *outcome;
    uint64_t position; /* everything before it is finished */
    unsigned epoch;
    bool nowait;
};

TAPFS_INTERNAL void request_begin(struct request *request, tapfs_disk *disk, tapfs_outcome *outcome);
TAPFS_INTERNAL void request_end(struct request *request);
TAPFS_INTERNAL int request_fail(struct request *request, int error, const char *operation, uint32_t layer,
                                uint32_t file, uint64_t offset);
/* The same for an error of a host file at [offset, offset + length): what is not here is to be fetched. */
TAPFS_INTERNAL int request_host_error(struct request *request, int error, const char *operation, uint32_t layer,
                                      uint32_t file, uint64_t offset, uint64_t length);
TAPFS_INTERNAL int request_stop(struct request *request, int32_t status, uint32_t layer, uint64_t offset,
                                uint64_t length);
/* Have who watches the probes see that a request lacks a map or places. */
static inline void probe_stop(int32_t status, uint32_t layer, uint64_t offset, uint64_t length)
{
    if (status == TAPFS_MISS) {
        TAPFS_PROBE3(map__miss, layer, offset, length);
    } else if (status == TAPFS_RESERVE) {
        TAPFS_PROBE2(reserve, offset, length);
    }
}
static inline struct layer *disk_layer(const tapfs_disk *disk, uint32_t index)
{
    return index < disk->layer_count ? disk->layers[index] : NULL;
}
/* A request with `nowait`: AGAIN, with EAGAIN or EOPNOTSUPP. */
TAPFS_INTERNAL int request_again(struct request *request, int error);
/* Somebody may have written to the files of layer 0 past the engine: the next sync must not take them for clean. */
TAPFS_INTERNAL void disk_note_foreign_writes(const tapfs_disk *disk);
/* Layer 0 if it can be written; else the request has failed and NULL. */
TAPFS_INTERNAL struct layer *writable_layer(struct request *request);

/* ---- engine/written.c */

TAPFS_INTERNAL void written_free(tapfs_disk *disk);

/* ---- engine/tables.c */

/* How far the layer has no tables from `offset` on, which takes no look at the cache. */
TAPFS_INTERNAL uint64_t table_absent_until(const struct layer *layer, uint64_t offset, uint64_t end);
/* What such a range is. */
TAPFS_INTERNAL uint8_t table_absent_kind(const struct layer *layer);

/* ---- engine/merged.c: the map of the whole chain in one, where it is wanted again and again */

/* The layer of merged units in the cache. */
#define MERGED_LAYER UINT32_MAX

/* After a layer was added. */
TAPFS_INTERNAL void merged_set_unit(tapfs_disk *disk);
/*
 * The runs of [offset, end) as far as the merged unit of `offset` and `capacity` go, each with the layer that gives it
 * (`depth`). UNALLOCATED is below the last layer, or past the end of one that is shorter than the layer above it.
 * MISSING: go down the layers one by one, up to `stop`. A unit is made if the map of the highest layer that has tables
 * here is cached already; `empty_too`: also where none has any. WOULD_BLOCK is left to who goes down.
 */
TAPFS_INTERNAL int merged_lookup(tapfs_disk *disk, uint64_t offset, uint64_t end, bool empty_too, bool nowait,
                                 tapfs_extent *runs, size_t capacity, size_t *count, uint64_t *stop);
/* The map of a layer changes, with the mutex of the cache held. */
TAPFS_INTERNAL void merged_patch(tapfs_disk *disk, uint32_t layer, const tapfs_extent *extents, size_t count);
TAPFS_INTERNAL void merged_forget(tapfs_disk *disk, uint64_t offset, uint64_t end);

/* ---- engine/read.c */

/* Read [offset, offset + length) as layer `index` and what lies below show it. */
TAPFS_INTERNAL int layer_read(struct request *request, uint32_t index, uint8_t *buffer, uint64_t offset,
                              uint64_t length);

/* ---- engine/guard.c */

TAPFS_INTERNAL void guard_init(struct guard *guard);
TAPFS_INTERNAL void guard_destroy(struct guard *guard);
/* Whether a guarded place lies where a run of layer 0 does. */
TAPFS_INTERNAL bool guarded(tapfs_disk *disk, const tapfs_extent *run);

/* ---- engine/write.c */

/* Whether segments ascend, do not overlap and lie inside the disk; else the request has failed. */
TAPFS_INTERNAL bool segments_valid(struct request *request, const tapfs_segment *segments, size_t count);

/* ---- engine/gather.c: pieces that follow each other in a host file of layer 0, written at once */

#define GATHERED_VECTORS 256

struct gather {
    struct request *request;
    uint32_t file;
    uint64_t host, length; /* of all pieces */
    int count;
    uint8_t *fills; /* memory of those pieces that are old contents of the disk, in use until they are written */
    uint64_t fills_length, fills_capacity;
    struct iovec vector[GATHERED_VECTORS];
};

/* Write what was gathered. */
TAPFS_INTERNAL int gather_write(struct gather *gather);
/* Add bytes, which stay the caller's until they are written; what they do not follow is written first. No cipher, and no
 * file that is written directly. */
TAPFS_INTERNAL int gather_add(struct gather *gather, uint32_t file, uint64_t host, const uint8_t *bytes,
                              uint64_t length);

/* ---- engine/layer_write.c: guest bytes at a host place of layer 0 */

/* Write bytes of guest offset `guest` at `host`, encrypted if the layer has a cipher. */
TAPFS_INTERNAL int layer_write(struct request *request, uint32_t file, uint64_t host, uint64_t guest,
                               const uint8_t *buffer, uint64_t length);
/* The same without a cipher: metadata and packed payloads. */
TAPFS_INTERNAL int layer_write_plain(struct request *request, uint32_t file, uint64_t host, const uint8_t *buffer,
                                     uint64_t length);
/* Make a placement read as zeros; `discard`: only if that frees space. */
TAPFS_INTERNAL int layer_zero(struct request *request, const tapfs_placement *placement, bool discard);
/* Give the space back if the host can. */
TAPFS_INTERNAL void layer_discard(struct request *request, uint32_t file, uint64_t host, uint64_t length);

#endif
