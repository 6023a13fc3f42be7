/* The codecs: functions that unpack a payload and pack granules. A codec is one row of `codecs`. */
#include <errno.h>
#include <libdeflate.h>
#include <stdlib.h>
#include <string.h>
#define ZLIB_CONST
#include <zlib.h>
#include <zstd.h>
#include <zstd_errors.h>

#include "engine/bytes.h"
#include "engine/deflate.h"
#include "engine/internal.h"

/* Of libdeflate: 72 MB/s and 33.0 % on 4 KiB granules of text, where level 6 makes 42 MB/s and 32.5 %. */
#define SMALL_LEVEL 4
/* Of libdeflate: on 64 KiB of programs 1 % smaller than zlib's level 6, in 0.30 of its time; level 4 is 1.5 % larger. */
#define LARGE_LEVEL 5
#define ZSTD_LEVEL 3
/* Tables as large as 64 KiB can use: on programs, sources, documents and byte code 0.1 % smaller and 2 % faster. */
#define ZSTD_HASH_LOG 17
#define ZSTD_CHAIN_LOG 16

/* ---- unpacking */

static bool has_deflate(struct unpackers *unpackers)
{
    if (unpackers->deflate == NULL) {
        unpackers->deflate = libdeflate_alloc_decompressor();
    }
    return unpackers->deflate != NULL;
}

typedef enum libdeflate_result (*unpack_stream)(struct libdeflate_decompressor *decompressor, const void *in,
                                                size_t in_bytes, void *out, size_t out_bytes, size_t *consumed,
                                                size_t *produced);

/* By a function of libdeflate that ends in _ex: what is behind the stream is slack. */
static int unpack_by_libdeflate(struct unpackers *unpackers, unpack_stream function, const uint8_t *payload,
                                uint64_t length, uint8_t *out, uint64_t unit, size_t *produced)
{
    size_t consumed = 0;
    if (!has_deflate(unpackers)) {
        return ENOMEM;
    }
    enum libdeflate_result result = function(unpackers->deflate, payload, length, out, unit, &consumed, produced);
    return result == LIBDEFLATE_SUCCESS ? 0 : EUCLEAN;
}

/* A stream that goes on after the whole unit, or breaks off there, has given all that is wanted of it. */
static int unpack_start_of_deflate(const uint8_t *payload, uint64_t length, uint8_t *out, uint64_t unit)
{
    z_stream stream = {.zalloc = Z_NULL, .zfree = Z_NULL, .opaque = Z_NULL};
    if (inflateInit2(&stream, -MAX_WBITS) != Z_OK) {
        return ENOMEM;
    }
    stream.next_in = payload;
    stream.avail_in = (uInt)length;
    stream.next_out = out;
    stream.avail_out = (uInt)unit;
    int result = inflate(&stream, Z_SYNC_FLUSH);
    bool whole = (result == Z_OK || result == Z_STREAM_END || result == Z_BUF_ERROR) && stream.avail_out == 0;
    inflateEnd(&stream);
    return whole ? 0 : EUCLEAN;
}

static int unpack_deflate(struct unpackers *unpackers, const uint8_t *payload, uint64_t length, uint8_t *out,
                          uint64_t unit, size_t *produced)
{
    int error = unpack_by_libdeflate(unpackers, libdeflate_deflate_decompress_ex, payload, length, out, unit, produced);
    if (error == EUCLEAN) {
        *produced = unit;
        error = unpack_start_of_deflate(payload, length, out, unit);
    }
    return error;
}

static int unpack_zlib(struct unpackers *unpackers, const uint8_t *payload, uint64_t length, uint8_t *out,
                       uint64_t unit, size_t *produced)
{
    return unpack_by_libdeflate(unpackers, libdeflate_zlib_decompress_ex, payload, length, out, unit, produced);
}

/* Several frames, or skippable ones between them: each to its end and its checksum, as many as the unit takes. */
static int unpack_zstd_frames(ZSTD_DCtx *context, const uint8_t *payload, uint64_t length, uint8_t *out, uint64_t unit,
                              size_t *produced)
{
    ZSTD_inBuffer in = {payload, length, 0};
    ZSTD_outBuffer room = {out, unit, 0};
    size_t left = 1;

    ZSTD_DCtx_reset(context, ZSTD_reset_session_only);
    while (left != 0 || (room.pos < unit && in.pos < length)) {
        size_t taken = in.pos, made = room.pos;
        bool between = left == 0;
        left = ZSTD_decompressStream(context, &room, &in);
        if (between && ZSTD_isError(left)) {
            break; /* slack behind the last frame */
        }
        if (ZSTD_isError(left) || (in.pos == taken && room.pos == made)) {
            return EUCLEAN;
        }
    }
    *produced = room.pos;
    return 0;
}

static int unpack_zstd(struct unpackers *unpackers, const uint8_t *payload, uint64_t length, uint8_t *out,
                       uint64_t unit, size_t *produced)
{
    if (unpackers->zstd == NULL) {
        unpackers->zstd = ZSTD_createDCtx();
    }
    if (unpackers->zstd == NULL) {
        return ENOMEM;
    }
    /* One frame is usual, and is unpacked at once; what is behind it is slack. */
    size_t frame = ZSTD_findFrameCompressedSize(payload, length);
    if (!ZSTD_isError(frame)) {
        *produced = ZSTD_decompressDCtx(unpackers->zstd, out, unit, payload, frame);
        if (!ZSTD_isError(*produced) && *produced == unit) {
            return 0;
        }
    }
    return unpack_zstd_frames(unpackers->zstd, payload, length, out, unit, produced);
}

/* ---- packing */

struct tapfs_packers {
    struct libdeflate_compressor *small, *large;
    struct deflater *windowed;
    ZSTD_CCtx *zstd;
};

tapfs_packers *tapfs_packers_new(void)
{
    return calloc(1, sizeof(struct tapfs_packers));
}

void tapfs_packers_free(tapfs_packers *packers)
{
    if (packers != NULL) {
        libdeflate_free_compressor(packers->small);
        libdeflate_free_compressor(packers->large);
        deflater_free(packers->windowed);
        ZSTD_freeCCtx(packers->zstd);
        free(packers);
    }
}

/* The compressor of a level, made when it is first wanted; NULL: no memory. */
static struct libdeflate_compressor *compressor_of(struct libdeflate_compressor **kept, int level)
{
    if (*kept == NULL) {
        *kept = libdeflate_alloc_compressor(level);
    }
    return *kept;
}

static int pack_deflate(tapfs_packers *packers, const uint8_t *in, uint64_t granule, uint8_t *out, uint64_t *size)
{
    /* In a granule no larger than the window no distance can exceed it, whatever libdeflate thinks. */
    if (granule <= DEFLATE_WINDOW) {
        struct libdeflate_compressor *small = compressor_of(&packers->small, SMALL_LEVEL);
        if (small == NULL) {
            return -ENOMEM;
        }
        *size = libdeflate_deflate_compress(small, in, granule, out, granule - 1);
        return 0;
    }
    /* libdeflate cannot limit its window. zlib can, and takes twice the time. */
    if (packers->windowed == NULL) {
        packers->windowed = deflater_new();
    }
    if (packers->windowed == NULL) {
        return -ENOMEM;
    }
    *size = deflater_pack(packers->windowed, in, granule, out, granule - 1);
    return 0;
}

static int pack_zlib(tapfs_packers *packers, const uint8_t *in, uint64_t granule, uint8_t *out, uint64_t *size)
{
    struct libdeflate_compressor *large = compressor_of(&packers->large, LARGE_LEVEL);
    if (large == NULL) {
        return -ENOMEM;
    }
    *size = libdeflate_zlib_compress(large, in, granule, out, granule - 1);
    return 0;
}

/* The context with its parameters, made when it is first wanted; NULL: no memory. */
static ZSTD_CCtx *zstd_of(tapfs_packers *packers)
{
    if (packers->zstd == NULL) {
        packers->zstd = ZSTD_createCCtx();
        if (packers->zstd != NULL) {
            ZSTD_CCtx_setParameter(packers->zstd, ZSTD_c_compressionLevel, ZSTD_LEVEL);
            ZSTD_CCtx_setParameter(packers->zstd, ZSTD_c_hashLog, ZSTD_HASH_LOG);
            ZSTD_CCtx_setParameter(packers->zstd, ZSTD_c_chainLog, ZSTD_CHAIN_LOG);
        }
    }
    return packers->zstd;
}

static int pack_zstd(tapfs_packers *packers, const uint8_t *in, uint64_t granule, uint8_t *out, uint64_t *size)
{
    ZSTD_CCtx *context = zstd_of(packers);
    if (context == NULL) {
        return -ENOMEM;
    }
    size_t packed = ZSTD_compress2(context, out, granule - 1, in, granule);
    if (ZSTD_isError(packed)) {
        *size = 0;
        return ZSTD_getErrorCode(packed) == ZSTD_error_memory_allocation ? -ENOMEM : 0;
    }
    *size = packed;
    return 0;
}

/* ---- the table */

/*
 * unpack: at most `unit` bytes out of the beginning of the payload, which may have slack behind the stream, as formats
 * that count sectors have; `produced` counts them. 0, EUCLEAN or ENOMEM.
 * pack: one granule; `size` is 0 where it does not shrink. 0 or -ENOMEM. NULL: it only unpacks. `looks`: the granule is
 * looked at before, because the library would take as long as for text to find that it does not shrink.
 */
struct codec_kind {
    int (*unpack)(struct unpackers *unpackers, const uint8_t *payload, uint64_t length, uint8_t *out, uint64_t unit,
                  size_t *produced);
    int (*pack)(tapfs_packers *packers, const uint8_t *in, uint64_t granule, uint8_t *out, uint64_t *size);
    bool looks;
    bool library; /* it is there once its library is loaded */
};

static const struct codec_kind codecs[] = {
    [TAPFS_CODEC_NONE] = {.unpack = NULL},
    [TAPFS_CODEC_RAW_DEFLATE] = {.unpack = unpack_deflate, .pack = pack_deflate, .looks = true},
    [TAPFS_CODEC_ZLIB] = {.unpack = unpack_zlib, .pack = pack_zlib, .looks = true},
    [TAPFS_CODEC_ZSTD] = {.unpack = unpack_zstd, .pack = pack_zstd},
    [TAPFS_CODEC_BZIP2] = {.unpack = unpack_bzip2, .library = true},
    [TAPFS_CODEC_LZMA] = {.unpack = unpack_lzma, .library = true},
    [TAPFS_CODEC_LZFSE] = {.unpack = unpack_lzfse, .library = true},
    [TAPFS_CODEC_ADC] = {.unpack = unpack_adc},
};

bool codec_known(uint32_t codec)
{
    return codec < sizeof codecs / sizeof codecs[0] && (!codecs[codec].library || codec_library_loaded(codec));
}

void unpackers_free(struct unpackers *unpackers)
{
    libdeflate_free_decompressor(unpackers->deflate);
    ZSTD_freeDCtx(unpackers->zstd);
}

int unpackers_unpack(struct unpackers *unpackers, uint32_t codec, const uint8_t *payload, uint64_t length, uint8_t *out,
                     uint64_t unit, uint64_t least, uint64_t *produced)
{
    size_t made = 0;
    int error = codecs[codec].unpack(unpackers, payload, length, out, unit, &made);
    if (error == 0 && made < least) {
        error = EUCLEAN;
    }
    if (error == 0) {
        memset(out + made, 0, unit - made);
    }
    *produced = made;
    return error;
}

int tapfs_pack(tapfs_packers *packers, uint32_t codec, const void *granule, uint64_t length, void *out, uint64_t *size)
{
    if (!codec_known(codec) || codecs[codec].pack == NULL || length < 2 || length > MAP_UNIT_MAX) {
        return -EINVAL;
    }
    if (codecs[codec].looks && does_not_shrink(granule, length)) {
        *size = 0;
        return 0;
    }
    return codecs[codec].pack(packers, granule, length, out, size);
}

int tapfs_compress(uint32_t codec, const void *buffer, uint64_t granule, size_t count, void *out, uint64_t *sizes)
{
    tapfs_packers *packers = tapfs_packers_new();
    const uint8_t *in = buffer;
    uint8_t *place = out;
    int error = packers == NULL ? -ENOMEM : 0;

    for (size_t i = 0; i < count && error == 0; i++) {
        error = tapfs_pack(packers, codec, in + i * granule, granule, place, &sizes[i]);
        place += error == 0 ? sizes[i] : 0;
    }
    tapfs_packers_free(packers);
    return error;
}
