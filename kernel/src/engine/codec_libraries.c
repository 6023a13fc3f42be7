/*
 * The codecs of libraries that the engine is not linked with: bzip2, LZMA and LZFSE. Few images are packed by them, so
 * the library is opened when a disk first needs it.
 */
#include <dlfcn.h>
#include <errno.h>
#include <string.h>

#include "engine/internal.h"

/* As the headers of libbz2, liblzma and liblzfse declare them. */
typedef int (*bzip2_function)(char *out, unsigned *out_bytes, char *in, unsigned in_bytes, int small, int verbosity);
typedef int (*lzma_function)(uint64_t *memory, uint32_t flags, const void *allocator, const uint8_t *in, size_t *in_at,
                             size_t in_bytes, uint8_t *out, size_t *out_at, size_t out_bytes);
typedef size_t (*lzfse_function)(uint8_t *out, size_t out_bytes, const uint8_t *in, size_t in_bytes, void *scratch);

/* A stream may ask for no more to be unpacked. */
#define LZMA_MEMORY (256u << 20)

static const char *const symbols[] = {
    [TAPFS_CODEC_BZIP2] = "BZ2_bzBuffToBuffDecompress",
    [TAPFS_CODEC_LZMA] = "lzma_stream_buffer_decode",
    [TAPFS_CODEC_LZFSE] = "lzfse_decode_buffer",
};
#define SYMBOLS (sizeof symbols / sizeof symbols[0])

/* The function of each codec; once set it stays. */
static _Atomic(void *) functions[SYMBOLS];

bool codec_library_loaded(uint32_t codec)
{
    return codec < SYMBOLS && atomic_load(&functions[codec]) != NULL;
}

int tapfs_codec_library(uint32_t codec, const char *path)
{
    if (codec >= SYMBOLS || symbols[codec] == NULL) {
        return -EINVAL;
    }
    if (codec_library_loaded(codec)) {
        return 0;
    }
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    void *function = library == NULL ? NULL : dlsym(library, symbols[codec]);
    if (function == NULL) {
        if (library != NULL) {
            dlclose(library);
        }
        return -ENOPKG;
    }
    atomic_store(&functions[codec], function);
    return 0;
}

int unpack_bzip2(struct unpackers *unpackers, const uint8_t *payload, uint64_t length, uint8_t *out, uint64_t unit,
                 size_t *produced)
{
    bzip2_function decompress;
    void *function = atomic_load(&functions[TAPFS_CODEC_BZIP2]);
    unsigned made = (unsigned)unit;
    char *in;

    (void)unpackers;
    memcpy(&decompress, &function, sizeof decompress);
    /* The library does not write there, but its declaration does not say so. */
    memcpy(&in, &payload, sizeof in);
    int result = decompress((char *)out, &made, in, (unsigned)length, 0, 0);
    *produced = made;
    return result == 0 ? 0 : EUCLEAN;
}

int unpack_lzma(struct unpackers *unpackers, const uint8_t *payload, uint64_t length, uint8_t *out, uint64_t unit,
                size_t *produced)
{
    lzma_function decode;
    void *function = atomic_load(&functions[TAPFS_CODEC_LZMA]);
    uint64_t memory = LZMA_MEMORY;
    size_t in_at = 0;

    (void)unpackers;
    memcpy(&decode, &function, sizeof decode);
    *produced = 0;
    return decode(&memory, 0, NULL, payload, &in_at, length, out, produced, unit) == 0 ? 0 : EUCLEAN;
}

int unpack_lzfse(struct unpackers *unpackers, const uint8_t *payload, uint64_t length, uint8_t *out, uint64_t unit,
                 size_t *produced)
{
    lzfse_function decode;
    void *function = atomic_load(&functions[TAPFS_CODEC_LZFSE]);

    (void)unpackers;
    memcpy(&decode, &function, sizeof decode);
    *produced = decode(out, unit, payload, length, NULL);
    return *produced > 0 ? 0 : EUCLEAN;
}

/*
 * ADC, Apple Data Compression. A byte with bit 7 counts literal bytes; one with bit 6 begins a copy with a distance of two
 * bytes, another one a copy with a distance of ten bits.
 */
int unpack_adc(struct unpackers *unpackers, const uint8_t *payload, uint64_t length, uint8_t *out, uint64_t unit,
               size_t *produced)
{
    uint64_t at = 0, made = 0;

    (void)unpackers;
    while (at < length && made < unit) {
        uint8_t control = payload[at];
        uint64_t more = (control & 0x80) != 0 ? 1u : (control & 0x40) != 0 ? 3u : 2u;
        uint64_t count = (control & 0x80) != 0   ? (control & 0x7Fu) + 1
                         : (control & 0x40) != 0 ? (control & 0x3Fu) + 4
                                                 : (control >> 2 & 0xFu) + 3;
        uint64_t literal = more == 1 ? count : 0;
        if (length - at < more + literal || unit - made < count) {
            return EUCLEAN;
        }
        if (more == 1) {
            memcpy(out + made, payload + at + 1, count);
        } else {
            uint64_t distance = more == 3 ? (uint64_t)payload[at + 1] << 8 | payload[at + 2]
                                          : (uint64_t)(control & 3u) << 8 | payload[at + 1];
            if (distance >= made) {
                return EUCLEAN;
            }
            for (uint64_t i = 0; i < count; i++) {
                out[made + i] = out[made + i - distance - 1];
            }
        }
        made += count;
        at += more + literal;
    }
    *produced = made;
    return 0;
}
