/*
 * The least that a conversion takes: the host's reads and writes of the same clusters and the library that packs them.
 *
 *     bound unpack IMAGE.qcow2 OUT CODEC    every cluster of the disk into a raw file
 *     bound pack RAW OUT CODEC              each cluster of 64 KiB that is no zeros, packed, one behind the other
 *
 * It has two threads, no checks, no refcounts and, of `pack`, no tables: what a whole program takes beyond it is its own.
 * IMAGE has one L1 table and no parent; it is trusted. Numbers are of docs/specs/qcow2.md, "Refcounts, L1, L2".
 */
#include <endian.h>
#include <fcntl.h>
#include <libdeflate.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <zstd.h>

#define WINDOW (4u << 20)
#define THREADS 2
#define OFFSET_MASK 0x00fffffffffffe00ull
#define PACKED (1ull << 62)
/* As tapfs and qemu-img have them. */
#define ZSTD_LEVEL 3
#define DEFLATE_LEVEL 1
#define PACK_BITS 16

static int source, target;
static bool by_zstd;
static unsigned bits;
static uint64_t size, *entries;
static atomic_ullong next_window, packed_end;

static void need(bool holds, const char *what)
{
    if (!holds) {
        perror(what);
        exit(1);
    }
}

static void *room(size_t bytes)
{
    void *memory = malloc(bytes);
    need(memory != NULL, "memory");
    return memory;
}

static void get(void *into, uint64_t length, uint64_t at)
{
    need(pread(source, into, length, (off_t)at) >= 0, "read");
}

static void put(const void *from, uint64_t length, uint64_t at)
{
    need(pwrite(target, from, length, (off_t)at) == (ssize_t)length, "write");
}

static void read_tables(void)
{
    uint8_t header[104];
    uint32_t cluster_bits, l1_count;
    uint64_t l1_at, disk;

    get(header, sizeof header, 0);
    memcpy(&cluster_bits, header + 20, 4);
    memcpy(&disk, header + 24, 8);
    memcpy(&l1_count, header + 36, 4);
    memcpy(&l1_at, header + 40, 8);
    bits = be32toh(cluster_bits);
    size = be64toh(disk);
    uint64_t tables = be32toh(l1_count), *l1 = room(8 * tables), table = 1ull << bits;
    entries = calloc(tables, table);
    need(entries != NULL, "memory");
    get(l1, 8 * tables, be64toh(l1_at));
    for (uint64_t i = 0; i < tables; i++) {
        uint64_t at = be64toh(l1[i]) & OFFSET_MASK;
        if (at != 0) {
            get((uint8_t *)entries + i * table, table, at);
        }
    }
    free(l1);
}

struct unpacker {
    struct libdeflate_decompressor *deflate;
    ZSTD_DCtx *zstd;
    uint8_t *packed;
};

static void unpack(struct unpacker *with, const uint8_t *from, size_t length, uint8_t *into)
{
    size_t cluster = 1u << bits, taken;

    if (!by_zstd) {
        (void)libdeflate_deflate_decompress_ex(with->deflate, from, length, into, cluster, &taken, &length);
        return;
    }
    size_t frame = ZSTD_findFrameCompressedSize(from, length);
    need(!ZSTD_isError(ZSTD_decompressDCtx(with->zstd, into, cluster, from, frame)), "zstd");
}

/* The run of clusters from `first` on that one read has: plain ones in a row, or packed ones that follow each other. */
static uint64_t run(uint64_t first, uint64_t stop, uint64_t *length)
{
    uint64_t cluster = 1ull << bits, entry = be64toh(entries[first]), number = first + 1;
    unsigned shift = 62 - (bits - 8);

    if (!(entry & PACKED)) {
        uint64_t at = entry & OFFSET_MASK;
        while (number < stop && (be64toh(entries[number]) & (OFFSET_MASK | PACKED)) == at + (number - first) * cluster) {
            number++;
        }
        *length = (number - first) * cluster;
        return number;
    }
    uint64_t at = entry & ((1ull << shift) - 1), end = at;
    for (number = first; number < stop && be64toh(entries[number]) & PACKED; number++) {
        uint64_t packed = be64toh(entries[number]), its = packed & ((1ull << shift) - 1);
        if (its < at || its > end + 512) {
            break;
        }
        end = its / 512 * 512 + (((packed & ~PACKED) >> shift) + 1) * 512;
    }
    *length = end - at;
    return number;
}

static void unpack_window(struct unpacker *with, uint64_t first, uint64_t stop, uint8_t *out)
{
    uint64_t cluster = 1ull << bits, ready = first; /* from here on it is not written yet */
    unsigned shift = 62 - (bits - 8);

    for (uint64_t number = first; number < stop;) {
        uint64_t entry = be64toh(entries[number]), length, next;
        if ((entry & (OFFSET_MASK | PACKED)) == 0) {
            if (number > ready) {
                put(out + (ready - first) * cluster, (number - ready) * cluster, ready * cluster);
            }
            ready = ++number;
            continue;
        }
        next = run(number, stop, &length);
        if (!(entry & PACKED)) {
            get(out + (number - first) * cluster, length, entry & OFFSET_MASK);
        } else {
            uint64_t start = entry & ((1ull << shift) - 1);
            get(with->packed, length, start);
            for (uint64_t each = number; each < next; each++) {
                uint64_t at = (be64toh(entries[each]) & ((1ull << shift) - 1)) - start;
                unpack(with, with->packed + at, length - at, out + (each - first) * cluster);
            }
        }
        number = next;
    }
    if (stop > ready) {
        put(out + (ready - first) * cluster, (stop - ready) * cluster, ready * cluster);
    }
}

static void *unpack_windows(void *unused)
{
    struct unpacker with = {libdeflate_alloc_decompressor(), ZSTD_createDCtx(), room(2 * WINDOW)};
    uint8_t *out = room(WINDOW);
    uint64_t each = WINDOW >> bits, clusters = size >> bits;

    for (;;) {
        uint64_t first = atomic_fetch_add(&next_window, 1) * each;
        if (first >= clusters) {
            return unused;
        }
        unpack_window(&with, first, first + each < clusters ? first + each : clusters, out);
    }
}

static void *pack_windows(void *unused)
{
    ZSTD_CCtx *zstd = ZSTD_createCCtx();
    struct libdeflate_compressor *deflate = libdeflate_alloc_compressor(DEFLATE_LEVEL);
    uint8_t *in = room(WINDOW), *out = room(WINDOW);
    const size_t cluster = 1u << PACK_BITS;

    for (;;) {
        uint64_t at = atomic_fetch_add(&next_window, 1) * WINDOW, length = 0;
        if (at >= size) {
            return unused;
        }
        uint64_t here = size - at < WINDOW ? size - at : WINDOW;
        get(in, here, at);
        for (uint64_t each = 0; each + cluster <= here; each += cluster) {
            if (in[each] == 0 && memcmp(in + each, in + each + 1, cluster - 1) == 0) {
                continue;
            }
            size_t packed = by_zstd ? ZSTD_compressCCtx(zstd, out + length, cluster - 1, in + each, cluster, ZSTD_LEVEL)
                                    : libdeflate_deflate_compress(deflate, in + each, cluster, out + length, cluster - 1);
            if (packed == 0 || ZSTD_isError(packed)) {
                packed = cluster;
                memcpy(out + length, in + each, cluster);
            }
            length += packed;
        }
        put(out, length, atomic_fetch_add(&packed_end, length));
    }
}

int main(int count, char **words)
{
    pthread_t threads[THREADS];

    need(count == 5, "bound unpack|pack SOURCE TARGET zlib|zstd|none");
    source = open(words[2], O_RDONLY);
    target = open(words[3], O_WRONLY | O_CREAT | O_TRUNC, 0600);
    need(source >= 0 && target >= 0, "open");
    by_zstd = strcmp(words[4], "zstd") == 0;
    bool unpacks = strcmp(words[1], "unpack") == 0;
    if (unpacks) {
        read_tables();
        need(ftruncate(target, (off_t)size) == 0, "truncate");
    } else {
        size = (uint64_t)lseek(source, 0, SEEK_END);
    }
    for (int i = 0; i < THREADS; i++) {
        need(pthread_create(&threads[i], NULL, unpacks ? unpack_windows : pack_windows, NULL) == 0, "thread");
    }
    for (int i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
    }
    need(fdatasync(target) == 0, "sync");
    return 0;
}
