/* The codecs: functions that unpack a payload and pack granules. A codec is one row of `codecs`. */
#include <errno.h>
#include <libdeflate.h>
#include <stdlib.h>
#include <string.h>
#define ZLIB_CONST
#include <zlib.h>
#include <zstd.h>

#include "engine/deflate.h"
#include "engine/internal.h"

/* Of libdeflate: 72 MB/s and 33.0 % on 4 KiB granules of text, where level 6 makes 42 MB/s and 32.5 %. */
#define SMALL_LEVEL 4
/* Of libdeflate: on 64 KiB of programs 1 % smaller than zlib's level 6, in 0.30 of its time; level 4 is 1.5 % larger. */
#define LARGE_LEVEL 5
#define ZSTD_LEVEL 3

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

struct packer {
    struct libdeflate_compressor *compressor;
    size_t (*compress)(struct libdeflate_compressor *compressor, const void *in, size_t in_bytes, void *out,
                       size_t out_bytes);
};

static int pack_by_libdeflate(const struct packer *packer, const uint8_t *in, uint64_t granule, size_t count,
                              uint8_t *out, uint64_t *sizes)
{
    if (packer->compressor == NULL) {
        return -ENOMEM;
    }
    for (size_t i = 0; i < count; i++) {
        const uint8_t *from = in + i * granule;
        /* libdeflate would take as long as for text to find that out. */
        sizes[i] = does_not_shrink(from, granule)
                       ? 0
                       : packer->compress(packer->compressor, from, granule, out, granule - 1);
        out += sizes[i];
    }
    libdeflate_free_compressor(packer->compressor);
    return 0;
}

/* libdeflate cannot limit its window. zlib can, and takes twice the time. */
static int pack_windowed(const uint8_t *in, uint64_t granule, size_t count, uint8_t *out, uint64_t *sizes)
{
    struct deflater *deflater = deflater_new();
    if (deflater == NULL) {
        return -ENOMEM;
    }
    for (size_t i = 0; i < count; i++) {
        const uint8_t *from = in + i * granule;
        sizes[i] = does_not_shrink(from, granule) ? 0 : deflater_pack(deflater, from, granule, out, granule - 1);
        out += sizes[i];
    }
    deflater_free(deflater);
    return 0;
}

static int pack_deflate(const uint8_t *in, uint64_t granule, size_t count, uint8_t *out, uint64_t *sizes)
{
    /* In a granule no larger than the window no distance can exceed it, whatever libdeflate thinks. */
    if (granule > DEFLATE_WINDOW) {
        return pack_windowed(in, granule, count, out, sizes);
    }
    const struct packer packer = {libdeflate_alloc_compressor(SMALL_LEVEL), libdeflate_deflate_compress};
    return pack_by_libdeflate(&packer, in, granule, count, out, sizes);
}

static int pack_zlib(const uint8_t *in, uint64_t granule, size_t count, uint8_t *out, uint64_t *sizes)
{
    const struct packer packer = {libdeflate_alloc_compressor(LARGE_LEVEL), libdeflate_zlib_compress};
    return pack_by_libdeflate(&packer, in, granule, count, out, sizes);
}

static int pack_zstd(const uint8_t *in, uint64_t granule, size_t count, uint8_t *out, uint64_t *sizes)
{
    ZSTD_CCtx *context = ZSTD_createCCtx();
    if (context == NULL) {
        return -ENOMEM;
    }
    for (size_t i = 0; i < count; i++) {
        size_t packed = ZSTD_compressCCtx(context, out, granule - 1, in + i * granule, granule, ZSTD_LEVEL);
        sizes[i] = ZSTD_isError(packed) ? 0 : packed;
        out += sizes[i];
    }
    ZSTD_freeCCtx(context);
    return 0;
}

/* ---- the table */

/*
 * unpack: at most `unit` bytes out of the beginning of the payload, which may have slack behind the stream, as formats
 * that count sectors have; `produced` counts them. 0, EUCLEAN or ENOMEM.
 * pack: each granule on its own; sizes[i] is 0 where one does not shrink. NULL: it only unpacks.
 */
struct codec_kind {
    int (*unpack)(struct unpackers *unpackers, const uint8_t *payload, uint64_t length, uint8_t *out, uint64_t unit,
                  size_t *produced);
    int (*pack)(const uint8_t *in, uint64_t granule, size_t count, uint8_t *out, uint64_t *sizes);
    bool library; /* it is there once its library is loaded */
};

static const struct codec_kind codecs[] = {
    [TAPFS_CODEC_NONE] = {.unpack = NULL},
    [TAPFS_CODEC_RAW_DEFLATE] = {.unpack = unpack_deflate, .pack = pack_deflate},
    [TAPFS_CODEC_ZLIB] = {.unpack = unpack_zlib, .pack = pack_zlib},
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

int tapfs_compress(uint32_t codec, const void *buffer, uint64_t granule, size_t count, void *out, uint64_t *sizes)
{
    if (!codec_known(codec) || codecs[codec].pack == NULL || granule < 2 ||
        granule > MAP_UNIT_MAX) {
        return -EINVAL;
    }
    return codecs[codec].pack(buffer, granule, count, out, sizes);
}
