/*
 * The main program of a fuzzed program without libFuzzer: the inputs of a folder, then so many that differ from them by
 * chance. usage: PROGRAM FOLDER SEED COUNT; the number of inputs and 0.
 */
#include <dirent.h>
#include <sys/stat.h>

#include "fuzz.h"

#define KEPT_MAX 4096u
#define LONGEST (64u << 10)

static struct kept {
    uint8_t *bytes;
    size_t length;
} kept[KEPT_MAX];
static size_t kept_count;

static void keep(const char *path)
{
    FILE *file = fopen(path, "rb");
    struct stat status;

    HOLD(file != NULL && kept_count < KEPT_MAX && fstat(fileno(file), &status) == 0);
    struct kept *input = &kept[kept_count++];
    input->length = (size_t)status.st_size;
    input->bytes = malloc(input->length + 1);
    HOLD(input->bytes != NULL && fread(input->bytes, 1, input->length, file) == input->length);
    fclose(file);
}

static void run(const uint8_t *bytes, size_t length)
{
    /* Of its own, so that a sanitizer sees a look behind its end. */
    uint8_t *copy = malloc(length == 0 ? 1 : length);
    HOLD(copy != NULL);
    memcpy(copy, bytes, length);
    LLVMFuzzerTestOneInput(copy, length);
    free(copy);
}

static size_t below(unsigned *seed, size_t limit)
{
    return limit == 0 ? 0 : (size_t)rand_r(seed) % limit;
}

/* Change some bytes, cut the end off, or put another input's bytes there. */
static size_t change(uint8_t *bytes, size_t length, unsigned *seed)
{
    static const uint8_t edges[] = {0, 1, 2, 0x7f, 0x80, 0xfe, 0xff, 0x40};

    for (size_t edits = 1 + below(seed, 6); edits > 0; edits--) {
        size_t at = below(seed, length);
        const struct kept *other = &kept[below(seed, kept_count)];
        switch (below(seed, 8)) {
        case 0:
            length = at;
            break;
        case 1:
            if (other->length > 0 && length > 0) {
                size_t from = below(seed, other->length), count = other->length - from;
                count = count < LONGEST - at ? count : LONGEST - at;
                memcpy(bytes + at, other->bytes + from, count);
                length = at + count > length ? at + count : length;
            }
            break;
        case 2:
        case 3:
            for (size_t i = at; i < length && i < at + 8; i++) {
                bytes[i] = edges[below(seed, sizeof edges)];
            }
            break;
        default:
            if (length > 0) {
                bytes[at] = (uint8_t)rand_r(seed);
            }
        }
    }
    return length;
}

int main(int count, char **words)
{
    static uint8_t bytes[LONGEST];

    HOLD(count == 4);
    HOLD(LLVMFuzzerInitialize(&count, &words) == 0);
    DIR *folder = opendir(words[1]);
    HOLD(folder != NULL);
    for (const struct dirent *entry; (entry = readdir(folder)) != NULL;) {
        char path[4096];
        if (entry->d_name[0] != '.') {
            snprintf(path, sizeof path, "%s/%s", words[1], entry->d_name);
            keep(path);
        }
    }
    closedir(folder);
    for (size_t i = 0; i < kept_count; i++) {
        run(kept[i].bytes, kept[i].length);
    }
    unsigned seed = (unsigned)atoi(words[2]);
    size_t wanted = (size_t)atoi(words[3]);
    for (size_t i = 0; i < wanted; i++) {
        const struct kept *input = kept_count > 0 ? &kept[below(&seed, kept_count)] : &(struct kept){.bytes = bytes};
        size_t length = input->length < LONGEST ? input->length : LONGEST;
        memmove(bytes, input->bytes, length);
        run(bytes, change(bytes, length, &seed));
    }
    for (size_t i = 0; i < kept_count; i++) {
        free(kept[i].bytes);
    }
    printf("%zu\n", kept_count + wanted);
    return 0;
}
