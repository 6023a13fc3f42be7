/* Packed units: payloads read and unpacked (codecs.c), and kept where a part of one is read (unpacked.c). */
#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "engine/internal.h"

/* What one unpacking needs; idle ones wait in the codec. */
struct codec_context {
    struct unpackers unpackers;
    uint8_t *payload;
    uint64_t payload_size;
};

bool packing_valid(const tapfs_packing *packing)
{
    bool header = packing->length_bytes == 0
                      ? packing->header_bytes == 0
                      : (packing->length_bytes == 4 || packing->length_bytes == 8) && packing->header_bytes <= 4096 &&
                            packing->length_at + (uint32_t)packing->length_bytes <= packing->header_bytes;
    return codec_known(packing->codec) && header;
}

void codec_init(struct codec *codec, uint64_t own, const struct cache *map)
{
    *codec = (struct codec){.context_count = 0};
    unpacked_init(&codec->units, own, map);
    pthread_mutex_init(&codec->mutex, NULL);
}

static void context_free(struct codec_context *context)
{
    if (context != NULL) {
        unpackers_free(&context->unpackers);
        free(context->payload);
        free(context);
    }
}

void codec_destroy(struct codec *codec)
{
    unpacked_destroy(&codec->units);
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

/* The packed bytes in a payload: behind its header, if there is one, as many as the header says. */
static int strip_header(const tapfs_packing *packing, const uint8_t **payload, uint64_t *length)
{
    uint64_t packed = 0;

    if (packing->length_bytes == 0) {
        return 0;
    }
    if (*length < packing->header_bytes) {
        return EUCLEAN;
    }
    memcpy(&packed, *payload + packing->length_at, packing->length_bytes);
    packed = le64toh(packed);
    if (packed > *length - packing->header_bytes) {
        return EUCLEAN;
    }
    *payload += packing->header_bytes;
    *length = packed;
    return 0;
}

/* Unpack a whole unit into `out`. */
static int unpack(struct codec *codec, const struct codec_source *source, uint8_t *out, uint64_t *produced)
{
    uint64_t got = 0;
    struct codec_context *context = take_context(codec, source->host_length);

    if (context == NULL) {
        return ENOMEM;
    }
    int error = host_read(source->file, context->payload, source->host_offset, source->host_length, source->nowait,
                          &got);
    const uint8_t *payload = context->payload;
    if (error == 0) {
        error = strip_header(source->packing, &payload, &got);
    }
    if (error == 0) {
        error = unpackers_unpack(&context->unpackers, source->packing->codec, payload, got, out, source->unit,
                                 source->least, produced);
    }
    give_back_context(codec, context);
    return error;
}

int codec_read(struct codec *codec, const struct codec_source *source, uint8_t *buffer, uint64_t inner,
               uint64_t length)
{
    uint64_t produced = 0;

    if (length == source->unit) {
        return unpack(codec, source, buffer, &produced);
    }
    if (unpacked_copy(&codec->units, source, buffer, inner, length)) {
        return 0;
    }
    uint8_t *data = unpacked_memory(&codec->units, source->unit);
    if (data == NULL) {
        return ENOMEM;
    }
    int error = unpack(codec, source, data, &produced);
    if (error != 0) {
        free(data);
        return error;
    }
    memcpy(buffer, data + inner, length);
    /* What a unit of its own length lacks is no zeros. */
    unpacked_keep(&codec->units, source, data, source->packing->own_units ? produced : source->unit);
    return 0;
}

void codec_drop_layer(struct codec *codec, uint32_t layer)
{
    unpacked_drop_layer(&codec->units, layer);
}
