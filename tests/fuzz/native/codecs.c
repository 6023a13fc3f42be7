/*
 * Payloads of every codec, as a hostile image has them: a unit or an error comes of any bytes, and nothing is written
 * behind the unit. What deflate gives is what zlib gives. An input is the codec, the size of the unit, its least part,
 * and the payload.
 */
#define ZLIB_CONST
#include <errno.h>
#include <zlib.h>

#include "engine/internal.h"
#include "fuzz.h"

static const uint8_t codecs[] = {TAPFS_CODEC_RAW_DEFLATE, TAPFS_CODEC_ZLIB, TAPFS_CODEC_ZSTD, TAPFS_CODEC_ADC,
                                 TAPFS_CODEC_BZIP2,       TAPFS_CODEC_LZMA, TAPFS_CODEC_LZFSE};
static struct unpackers unpackers;

int LLVMFuzzerInitialize(int *count, char ***words)
{
    (void)count;
    (void)words;
    /* One that is not installed is unknown then. */
    tapfs_codec_library(TAPFS_CODEC_BZIP2, "libbz2.so.1.0");
    tapfs_codec_library(TAPFS_CODEC_LZMA, "liblzma.so.5");
    tapfs_codec_library(TAPFS_CODEC_LZFSE, "liblzfse.so.1");
    return 0;
}

/* Where zlib takes the stream, too, it has made the same of it. */
static void compare(bool raw, const uint8_t *payload, size_t length, const uint8_t *out, size_t unit, size_t made)
{
    z_stream stream = {.zalloc = Z_NULL, .zfree = Z_NULL, .opaque = Z_NULL};
    uint8_t *other = malloc(unit);
    HOLD(other != NULL && inflateInit2(&stream, raw ? -MAX_WBITS : MAX_WBITS) == Z_OK);
    stream.next_in = payload;
    stream.avail_in = (uInt)length;
    stream.next_out = other;
    stream.avail_out = (uInt)unit;
    if (inflate(&stream, Z_FINISH) == Z_STREAM_END) {
        HOLD(stream.total_out == made && memcmp(other, out, made) == 0);
    }
    inflateEnd(&stream);
    free(other);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input input = {data, size};
    uint8_t codec = codecs[take_byte(&input) % sizeof codecs];
    uint64_t unit = 512ull << take_byte(&input) % 9, least = take_byte(&input) * unit / 255, produced = 0;
    uint8_t *payload = malloc(input.left == 0 ? 1 : input.left), *out = malloc(unit);

    HOLD(payload != NULL && out != NULL);
    size_t length = input.left;
    take_bytes(&input, payload, length);
    if (codec_known(codec)) {
        int error = unpackers_unpack(&unpackers, codec, payload, length, out, unit, least, &produced);
        HOLD(error == 0 || error == EUCLEAN || error == ENOMEM);
        HOLD(error != 0 || (produced >= least && produced <= unit));
        for (uint64_t i = produced; error == 0 && i < unit; i++) {
            HOLD(out[i] == 0);
        }
        if (error == 0 && (codec == TAPFS_CODEC_RAW_DEFLATE || codec == TAPFS_CODEC_ZLIB)) {
            compare(codec == TAPFS_CODEC_RAW_DEFLATE, payload, length, out, unit, produced);
        }
    }
    free(payload);
    free(out);
    return 0;
}
