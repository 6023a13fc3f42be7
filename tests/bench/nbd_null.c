/*
 * An NBD server without a disk: it answers each request of one client at a time out of one buffer that holds noise.
 *
 *     nbd_null SOCKET BYTES TOGETHER sleeps|looks
 *
 * The rate of a client in front of it is the most that the client reaches with any server: here a request costs nothing but
 * the socket. It answers when TOGETHER requests have come, or when none has come for a millisecond; until then it
 * sleeps, or looks without an end. Only its benchmark uses it, so it trusts its client (docs/specs/nbd.md has the protocol).
 */
#include <endian.h>
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define REQUEST_BYTES 28u
#define CHUNK_BYTES 28u
#define LONGEST_REQUEST (32u << 20)
#define REQUESTS_AT_ONCE 256u
#define OPTION_BYTES 4096u
#define PATIENCE_NS 1000000u

enum { OPTION_GO = 7, OPTION_STRUCTURED = 8 };
enum { COMMAND_READ = 0, COMMAND_DISCONNECT = 2 };

static uint8_t data[LONGEST_REQUEST];
static bool structured, looks;
static size_t together;

static void put16(uint8_t *at, uint16_t value)
{
    value = htobe16(value);
    memcpy(at, &value, sizeof value);
}

static void put32(uint8_t *at, uint32_t value)
{
    value = htobe32(value);
    memcpy(at, &value, sizeof value);
}

static void put64(uint8_t *at, uint64_t value)
{
    value = htobe64(value);
    memcpy(at, &value, sizeof value);
}

static uint32_t get32(const uint8_t *at)
{
    uint32_t value;
    memcpy(&value, at, sizeof value);
    return be32toh(value);
}

static bool take(int client, void *bytes, size_t length)
{
    return length == 0 || recv(client, bytes, length, MSG_WAITALL) == (ssize_t)length;
}

static bool give(int client, const void *bytes, size_t length)
{
    return send(client, bytes, length, MSG_NOSIGNAL) == (ssize_t)length;
}

static bool reply(int client, uint32_t option, uint32_t kind, const void *bytes, uint32_t length)
{
    uint8_t header[20];
    put64(header, 0x0003e889045565a9);
    put32(header + 8, option);
    put32(header + 12, kind);
    put32(header + 16, length);
    return give(client, header, sizeof header) && give(client, bytes, length);
}

static bool negotiate(int client, uint64_t size)
{
    uint8_t hello[18], header[16], option[OPTION_BYTES], export[12];
    put64(hello, 0x4e42444d41474943);
    put64(hello + 8, 0x49484156454f5054);
    put16(hello + 16, 3);
    put16(export, 0);
    put64(export + 2, size);
    put16(export + 10, 0x103); /* flags, read-only, several connections */
    structured = false;
    if (!give(client, hello, sizeof hello) || !take(client, header, 4)) {
        return false;
    }
    while (take(client, header, sizeof header)) {
        uint32_t kind = get32(header + 8), length = get32(header + 12);
        if (length > sizeof option || !take(client, option, length)) {
            return false;
        }
        if (kind == OPTION_GO) {
            return reply(client, kind, 3, export, sizeof export) && reply(client, kind, 1, NULL, 0);
        }
        structured = structured || kind == OPTION_STRUCTURED;
        if (!reply(client, kind, kind == OPTION_STRUCTURED ? 1 : 0x80000001, NULL, 0)) {
            return false;
        }
    }
    return false;
}

static uint64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

/* More bytes of requests; 0: the client is gone, negative: none have come for a millisecond. */
static ssize_t more(int client, uint8_t *room, size_t length)
{
    uint64_t start = looks ? now() : 0;
    ssize_t got;
    do {
        got = recv(client, room, length, looks ? MSG_DONTWAIT : 0);
    } while (got < 0 && looks && now() - start < PATIENCE_NS);
    return got;
}

static bool send_all(int client, struct iovec *parts, size_t count)
{
    while (count > 0) {
        struct msghdr message = {.msg_iov = parts, .msg_iovlen = count};
        ssize_t sent = sendmsg(client, &message, MSG_NOSIGNAL);
        if (sent < 0) {
            return false;
        }
        for (; count > 0 && (size_t)sent >= parts->iov_len; count--, parts++) {
            sent -= (ssize_t)parts->iov_len;
        }
        if (count > 0) {
            parts->iov_base = (uint8_t *)parts->iov_base + sent;
            parts->iov_len -= (size_t)sent;
        }
    }
    return true;
}

/* The header of an answer; its length. */
static size_t put_header(uint8_t *at, const uint8_t *request, bool reads)
{
    if (!structured) {
        put32(at, 0x67446698);
        put32(at + 4, 0);
        memcpy(at + 8, request + 8, 8);
        return 16;
    }
    put32(at, 0x668e33ef);
    put16(at + 4, 1);
    put16(at + 6, reads ? 1 : 0);
    memcpy(at + 8, request + 8, 8);
    put32(at + 16, reads ? get32(request + 24) + 8 : 0);
    memcpy(at + 20, request + 16, 8);
    return reads ? CHUNK_BYTES : CHUNK_BYTES - 8;
}

static void serve(int client)
{
    static uint8_t input[REQUESTS_AT_ONCE * REQUEST_BYTES], headers[REQUESTS_AT_ONCE][CHUNK_BYTES];
    static struct iovec parts[REQUESTS_AT_ONCE * 2];
    size_t have = 0;

    for (;;) {
        ssize_t got = more(client, input + have, sizeof input - have);
        if (got == 0) {
            return;
        }
        have += got > 0 ? (size_t)got : 0;
        if (got > 0 && have < together * REQUEST_BYTES) {
            continue;
        }
        size_t at = 0, count = 0;
        for (size_t i = 0; have - at >= REQUEST_BYTES; i++, at += REQUEST_BYTES) {
            const uint8_t *request = input + at;
            uint32_t command = get32(request + 4) & 0xffff, length = get32(request + 24);
            if (command == COMMAND_DISCONNECT || length > LONGEST_REQUEST) {
                return;
            }
            parts[count++] = (struct iovec){headers[i], put_header(headers[i], request, command == COMMAND_READ)};
            if (command == COMMAND_READ) {
                parts[count++] = (struct iovec){data, length};
            }
        }
        memmove(input, input + at, have - at);
        have -= at;
        if (!send_all(client, parts, count)) {
            return;
        }
    }
}

static void fill(void)
{
    uint64_t state = 88172645463325252u;
    for (size_t at = 0; at < sizeof data; at += sizeof state) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        memcpy(data + at, &state, sizeof state);
    }
}

int main(int count, char **words)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int listener = socket(AF_UNIX, SOCK_STREAM, 0);

    if (count != 5 || strlen(words[1]) >= sizeof address.sun_path) {
        return 2;
    }
    strcpy(address.sun_path, words[1]);
    together = strtoull(words[3], NULL, 10);
    looks = strcmp(words[4], "looks") == 0;
    fill();
    signal(SIGCHLD, SIG_IGN);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) < 0 || listen(listener, 16) < 0) {
        perror(words[1]);
        return 1;
    }
    for (;;) {
        int client = accept(listener, NULL, NULL);
        if (client >= 0 && negotiate(client, strtoull(words[2], NULL, 10))) {
            struct timeval patience = {.tv_usec = PATIENCE_NS / 1000};
            setsockopt(client, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
            serve(client);
        }
        close(client);
    }
}
