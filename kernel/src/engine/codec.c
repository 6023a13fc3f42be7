/* Packed granules: raw deflate in both directions, and the few unpacked granules that partial
 * reads keep at hand. */
#include <errno.h>
#include <libdeflate.h>
#include <stdlib.h>
#include <string.h>
#define ZLIB_CONST
#include <zlib.h>

#include "engine/internal.h"

/* The window of the format's payloads: a reader may use zlib with window bits -12. */
#define WINDOW_BITS 12
/* Of libdeflate: 72 MB/s and 33.0 % on 4 KiB granules of text, where level 6 makes 42 MB/s and 32.5 %. */
#define SMALL_LEVEL 4
#define ZLIB_LEVEL 6

/* What one unpacking needs; idle ones wait in the codec. */
struct codec_context {
    struct libdeflate_decompressor *decompressor;
    uint8_t *payload;
    uint64_t payload_size;
};

void codec_init(struct codec *codec)
{
    *codec = (struct codec){.clock = 0};
    pthread_mutex_init(&codec->mutex, NULL);
}

static void context_free(struct codec_context *context)
{
    if (context != NULL) {
        libdeflate_free_decompressor(context->decompressor);
        free(context->payload);
        free(context);
    }
}

void codec_destroy(struct codec *codec)
{
    for (size_t i = 0; i < CODEC_CLUSTERS; i++) {
        free(codec->clusters[i].data);
    }
    while (codec->context_count > 0) {
        context_free(codec->contexts[--codec->context_count]);
    }
    pthread_mutex_destroy(&codec->mutex);
}

static struct codec_context *take_context(struct codec *codec, uint64_t payload_size)
{
    struct codec_context *context = NULL;

    pthread_mutex_lock(&codec->mutex);
    if (codec->context_count > 0) {
        context = codec->contexts[--codec->context_count];
    }
    pthread_mutex_unlock(&codec->mutex);
    if (context == NULL) {
        context = calloc(1, sizeof *context);
        if (context == NULL) {
            return NULL;
        }
        context->decompressor = libdeflate_alloc_decompressor();
        if (context->decompressor == NULL) {
            free(context);
            return NULL;
        }
    }
    if (context->payload_size < payload_size) {
        free(context->payload);
        context->payload = malloc(payload_size);
        context->payload_size = context->payload == NULL ? 0 : payload_size;
        if (context->payload == NULL) {
            context_free(context);
            return NULL;
        }
    }
    return context;
}

static void give_back_context(struct codec *codec, struct codec_context *context)
{
    pthread_mutex_lock(&codec->mutex);
    if (codec->context_count < CODEC_CONTEXTS) {
        codec->contexts[codec->context_count++] = context;
        context = NULL;
    }
    pthread_mutex_unlock(&codec->mutex);
    context_free(context);
}

/* Unpack a whole granule into `out`. */
static int unpack(struct codec *codec, const struct codec_source *source, uint8_t *out)
{
    uint64_t got = 0;
    size_t produced = 0;
    struct codec_context *context = take_context(codec, source->host_length);

    if (context == NULL) {
        return ENOMEM;
    }
    int error = host_read(source->file, context->payload, source->host_offset, source->host_length, source->nowait,
                          &got);
    if (error == 0) {
        /* _ex: formats that count the payload in sectors have slack after the stream. */
        enum libdeflate_result result = libdeflate_deflate_decompress_ex(
            context->decompressor, context->payload, got, out, source->granule, NULL, &produced);
        error = result == LIBDEFLATE_SUCCESS && produced == source->granule ? 0 : EUCLEAN;
    }
    give_back_context(codec, context);
    return error;
}

static bool copy_kept(struct codec *codec, const struct codec_source *source, uint8_t *buffer, uint64_t inner,
                      uint64_t length)
{
    bool found = false;
    pthread_mutex_lock(&codec->mutex);
    for (size_t i = 0; i < CODEC_CLUSTERS && !found; i++) {
        struct codec_cluster *cluster = &codec->clusters[i];
        if (cluster->data != NULL && cluster->host_offset == source->host_offset &&
            cluster->host_length == source->host_length && cluster->layer == source->layer_index &&
            cluster->file == source->file_index) {
            memcpy(buffer, cluster->data + inner, length);
            cluster->used = ++codec->clock;
            found = true;
        }
    }
    pthread_mutex_unlock(&codec->mutex);
    return found;
}

/* Keep an unpacked granule in the place of the one that was wanted least recently. */
static void keep(struct codec *codec, const struct codec_source *source, uint8_t *data)
{
    pthread_mutex_lock(&codec->mutex);
    struct codec_cluster *place = &codec->clusters[0];
    for (size_t i = 1; i < CODEC_CLUSTERS && place->data != NULL; i++) {
        struct codec_cluster *cluster = &codec->clusters[i];
        if (cluster->data == NULL || cluster->used < place->used) {
            place = cluster;
        }
    }
    uint8_t *old = place->data;
    *place = (struct codec_cluster){
        .data = data,
        .host_offset = source->host_offset,
        .host_length = source->host_length,
        .used = ++codec->clock,
        .layer = source->layer_index,
        .file = source->file_index,
    };
    pthread_mutex_unlock(&codec->mutex);
    free(old);
}

int codec_read(struct codec *codec, const struct codec_source *source, uint8_t *buffer, uint64_t inner,
               uint64_t length)
{
    if (length == source->granule) {
        return unpack(codec, source, buffer);
    }
    if (copy_kept(codec, source, buffer, inner, length)) {
        return 0;
    }
    uint8_t *data = malloc(source->granule);
    if (data == NULL) {
        return ENOMEM;
    }
    int error = unpack(codec, source, data);
    if (error != 0) {
        free(data);
        return error;
    }
    memcpy(buffer, data + inner, length);
    keep(codec, source, data);
    return 0;
}

void codec_drop_layer(struct codec *codec, uint32_t layer)
{
    pthread_mutex_lock(&codec->mutex);
    for (size_t i = 0; i < CODEC_CLUSTERS; i++) {
        if (codec->clusters[i].layer == layer) {
            free(codec->clusters[i].data);
            codec->clusters[i] = (struct codec_cluster){.data = NULL};
        }
    }
    pthread_mutex_unlock(&codec->mutex);
}

/* In a granule no larger than the window no distance can exceed it, whatever libdeflate thinks. */
static int compress_small(const uint8_t *in, uint64_t granule, size_t count, uint8_t *out, uint64_t *sizes)
{
    struct libdeflate_compressor *compressor = libdeflate_alloc_compressor(SMALL_LEVEL);
    if (compressor == NULL) {
        return -ENOMEM;
    }
    for (size_t i = 0; i < count; i++) {
        sizes[i] = libdeflate_deflate_compress(compressor, in + i * granule, granule, out, granule - 1);
        out += sizes[i];
    }
    libdeflate_free_compressor(compressor);
    return 0;
}

/* libdeflate cannot limit its window, zlib can. */
static int compress_windowed(const uint8_t *in, uint64_t granule, size_t count, uint8_t *out, uint64_t *sizes)
{
    z_stream stream = {.zalloc = Z_NULL, .zfree = Z_NULL, .opaque = Z_NULL};
    if (deflateInit2(&stream, ZLIB_LEVEL, Z_DEFLATED, -WINDOW_BITS, 8, Z_DEFAULT_STRATEGY) != Z_OK) {
        return -ENOMEM;
    }
    for (size_t i = 0; i < count; i++) {
        deflateReset(&stream);
        stream.next_in = in + i * granule;
        stream.avail_in = (uInt)granule;
        stream.next_out = out;
        stream.avail_out = (uInt)granule - 1;
        sizes[i] = deflate(&stream, Z_FINISH) == Z_STREAM_END ? stream.total_out : 0;
        out += sizes[i];
    }
    deflateEnd(&stream);
    return 0;
}

int tapfs_compress(uint32_t codec, const void *buffer, uint64_t granule, size_t count, void *out, uint64_t *sizes)
{
    if (codec != TAPFS_CODEC_RAW_DEFLATE || granule < 2 || granule > MAP_UNIT_MAX) {
        return -EINVAL;
    }
    return granule <= 1u << WINDOW_BITS ? compress_small(buffer, granule, count, out, sizes)
                                        : compress_windowed(buffer, granule, count, out, sizes);
}
