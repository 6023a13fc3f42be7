/* The messages of the transmission phase as bytes: headers of requests and of replies, errors. */
#include <string.h>

#include "nbd/internal.h"

#define REQUEST_MAGIC 0x25609513u
#define EXTENDED_REQUEST_MAGIC 0x21e41c71u
#define SIMPLE_REPLY_MAGIC 0x67446698u
#define CHUNK_MAGIC 0x668e33efu
#define EXTENDED_REPLY_MAGIC 0x6e8a278cu

#define REQUEST_HEADER 28u
#define EXTENDED_HEADER 32u
#define CHUNK_HEADER 20u

static uint64_t get(const uint8_t *at, size_t bytes)
{
    uint64_t value = 0;
    for (size_t i = 0; i < bytes; i++) {
        value = value << 8 | at[i];
    }
    return value;
}

static void put(uint8_t *at, uint64_t value, size_t bytes)
{
    while (bytes-- > 0) {
        at[bytes] = (uint8_t)value;
        value >>= 8;
    }
}

void nbd_put16(uint8_t *at, uint16_t value)
{
    put(at, value, 2);
}

void nbd_put32(uint8_t *at, uint32_t value)
{
    put(at, value, 4);
}

void nbd_put64(uint8_t *at, uint64_t value)
{
    put(at, value, 8);
}

uint32_t nbd_get32(const uint8_t *at)
{
    return (uint32_t)get(at, 4);
}

uint64_t nbd_get64(const uint8_t *at)
{
    return get(at, 8);
}

int tapfs_nbd_decode(const uint8_t *bytes, size_t length, int extended, tapfs_nbd_asked *asked)
{
    uint32_t magic = extended ? EXTENDED_REQUEST_MAGIC : REQUEST_MAGIC;
    size_t header = extended ? EXTENDED_HEADER : REQUEST_HEADER;

    if (length >= 4 && get(bytes, 4) != magic) {
        return -EPROTO;
    }
    if (length < header) {
        return 0;
    }
    *asked = (tapfs_nbd_asked){
        .flags = (uint16_t)get(bytes + 4, 2),
        .command = (uint16_t)get(bytes + 6, 2),
        .cookie = get(bytes + 8, 8),
        .offset = get(bytes + 16, 8),
        .length = get(bytes + 24, extended ? 8 : 4),
    };
    return (int)header;
}

size_t nbd_simple_header(uint8_t *at, uint64_t cookie, int error)
{
    nbd_put32(at, SIMPLE_REPLY_MAGIC);
    nbd_put32(at + 4, (uint32_t)error);
    nbd_put64(at + 8, cookie);
    return 16;
}

size_t nbd_chunk_header_length(bool extended)
{
    return extended ? EXTENDED_HEADER : CHUNK_HEADER;
}

size_t nbd_chunk_header(uint8_t *at, bool extended, const tapfs_nbd_asked *asked, uint16_t flags, uint16_t type,
                        uint64_t payload)
{
    nbd_put32(at, extended ? EXTENDED_REPLY_MAGIC : CHUNK_MAGIC);
    nbd_put16(at + 4, flags);
    nbd_put16(at + 6, type);
    nbd_put64(at + 8, asked->cookie);
    if (extended) {
        nbd_put64(at + 16, asked->offset);
        nbd_put64(at + 24, payload);
    } else {
        nbd_put32(at + 16, (uint32_t)payload);
    }
    return nbd_chunk_header_length(extended);
}

/* The numbers of the protocol are those of Linux. */
int nbd_error(int error)
{
    switch (error) {
    case 0:
    case EPERM:
    case EIO:
    case ENOMEM:
    case EINVAL:
    case ENOSPC:
    case EOVERFLOW:
    case EOPNOTSUPP:
    case ESHUTDOWN:
        return error;
    case EDQUOT:
    case EFBIG:
        return ENOSPC;
    case EACCES:
    case EROFS:
        return EPERM;
    default:
        return EIO;
    }
}
