/* Write pieces that follow each other in a host file of layer 0 by one call of the host. */
#include "engine/internal.h"

int gather_write(struct gather *gather)
{
    struct request *request = gather->request;
    int count = gather->count;

    gather->count = 0;
    gather->fills_length = 0;
    if (count == 0) {
        return 0;
    }
    int error = host_write_vector(request->disk->layers[0]->files[gather->file], gather->vector, count, gather->host);
    return error == 0 ? 0 : request_fail(request, error, "write", 0, gather->file, gather->host);
}

int gather_add(struct gather *gather, uint32_t file, uint64_t host, const uint8_t *bytes, uint64_t length)
{
    bool follows = file == gather->file && host == gather->host + gather->length;

    if (length == 0) {
        return 0;
    }
    if ((!follows || gather->count == GATHERED_VECTORS) && gather_write(gather) != 0) {
        return -1;
    }
    if (gather->count == 0) {
        gather->file = file;
        gather->host = host;
        gather->length = 0;
    }
    /* struct iovec serves readers too, hence not const. */
    gather->vector[gather->count++] = (struct iovec){.iov_base = (void *)(uintptr_t)bytes, .iov_len = length};
    gather->length += length;
    return 0;
}
