/*
 * The packing of convert -c, by every codec and by our own packer in any room: it is unpacked to the same bytes, also by a
 * reader whose window has 4 KiB. An input is a recipe: literal bytes, repetitions and copies from further up make a
 * granule of up to 160 KiB. Frequencies of symbols give codes that fill the tree and are not too long.
 */
#define ZLIB_CONST
#include <zlib.h>

#include "engine/deflate.h"
#include "engine/internal.h"
#include "fuzz.h"

#define LONGEST (160u << 10)
#define SYMBOLS 286u

static struct unpackers unpackers;

int LLVMFuzzerInitialize(int *count, char ***words)
{
    (void)count;
    (void)words;
    return 0;
}

/* The bytes that the recipe makes, at most `room`. */
static size_t cook(struct input *recipe, uint8_t *out, size_t room)
{
    size_t made = 0;

    while (recipe->left > 0 && made < room) {
        uint8_t word = take_byte(recipe);
        size_t count = (size_t)(word & 0x3f) + 1;
        count = word < 0xc0 ? count : count << (take_byte(recipe) % 13);
        count = count < room - made ? count : room - made;
        if (word < 0x40) {
            take_bytes(recipe, out + made, count);
        } else if (word < 0x80 || made == 0) {
            memset(out + made, take_byte(recipe), count);
        } else {
            uint16_t back;
            take_bytes(recipe, &back, sizeof back);
            size_t distance = 1 + back % made;
            for (size_t i = 0; i < count; i++) {
                out[made + i] = out[made + i - distance];
            }
        }
        made += count;
    }
    return made;
}

static void inflate_small(const uint8_t *packed, size_t length, const uint8_t *wanted, size_t size)
{
    z_stream stream = {.zalloc = Z_NULL, .zfree = Z_NULL, .opaque = Z_NULL};
    uint8_t *out = malloc(size == 0 ? 1 : size);

    HOLD(out != NULL && inflateInit2(&stream, -12) == Z_OK);
    stream.next_in = packed;
    stream.avail_in = (uInt)length;
    stream.next_out = out;
    stream.avail_out = (uInt)size;
    HOLD(inflate(&stream, Z_FINISH) == Z_STREAM_END && stream.total_out == size && stream.avail_in == 0);
    HOLD(memcmp(out, wanted, size) == 0);
    inflateEnd(&stream);
    free(out);
}

static void pack_into(const uint8_t *granule, size_t size, size_t room)
{
    uint8_t *packed = malloc(room == 0 ? 1 : room);
    struct deflater *deflater = deflater_new();

    HOLD(packed != NULL && deflater != NULL);
    size_t length = deflater_pack(deflater, granule, size, packed, room);
    HOLD(length <= room);
    if (length > 0) {
        inflate_small(packed, length, granule, size);
    }
    deflater_free(deflater);
    free(packed);
}

static void pack(uint8_t codec, const uint8_t *granule, size_t size)
{
    uint64_t packed = 0, produced;
    uint8_t *out = malloc(size - 1), *back = malloc(size);

    HOLD(out != NULL && back != NULL);
    HOLD(tapfs_compress(codec, granule, size, 1, out, &packed) == 0 && packed < size);
    if (packed > 0) {
        HOLD(unpackers_unpack(&unpackers, codec, out, packed, back, size, size, &produced) == 0);
        HOLD(produced == size && memcmp(back, granule, size) == 0);
        if (codec == TAPFS_CODEC_RAW_DEFLATE) {
            inflate_small(out, packed, granule, size);
        }
    }
    free(out);
    free(back);
}

static void make_codes(struct input *input)
{
    uint32_t frequencies[SYMBOLS] = {0};
    uint8_t lengths[SYMBOLS];
    unsigned count = 2 + take_byte(input), longest = 8 + take_byte(input) % 8, used = 0;

    while (count > 1u << longest) {
        longest++;
    }
    for (unsigned i = 0; i < count; i++) {
        uint8_t word = take_byte(input);
        frequencies[i] = (uint32_t)(word & 7) << (word >> 3) % 16;
        used += frequencies[i] > 0;
    }
    huffman_lengths(frequencies, count, longest, lengths);
    uint64_t filled = 0;
    for (unsigned i = 0; i < count; i++) {
        HOLD(lengths[i] <= longest && (lengths[i] > 0 || frequencies[i] == 0));
        filled += lengths[i] > 0 ? 1u << (longest - lengths[i]) : 0;
    }
    HOLD(used < 2 ? filled <= 1u << longest : filled == 1u << longest);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input input = {data, size};
    uint8_t way = take_byte(&input);
    uint16_t room;

    if (way % 5 == 4) {
        make_codes(&input);
        return 0;
    }
    take_bytes(&input, &room, sizeof room);
    static uint8_t granule[LONGEST];
    size_t made = cook(&input, granule, LONGEST);
    uint8_t *exact = malloc(made == 0 ? 1 : made);
    HOLD(exact != NULL);
    memcpy(exact, granule, made);
    if (way % 5 == 3) {
        pack_into(exact, made, room);
    } else if (made >= 2) {
        pack((uint8_t)(TAPFS_CODEC_RAW_DEFLATE + way % 5), exact, made);
    }
    free(exact);
    return 0;
}
