/* Ciphers of guest data, sector by sector: the IV made of the number of the sector, the rest left to a library. */
#include <endian.h>
#include <errno.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <stdlib.h>
#include <string.h>

#include "engine/cipher.h"

/* Sectors that a library is given at once. */
#define SECTORS_AT_ONCE 64

/* A cipher and the one that encrypts IVs (ESSIV), if there is one, each with its key. */
struct cipher {
    const struct cipher_library *library;
    void *data, *iv;
    tapfs_cipher spec;
};

static const struct cipher_library *library_of(const tapfs_cipher *spec)
{
    if (openssl_ciphers.has(spec->algorithm, spec->mode, spec->key_bytes)) {
        return &openssl_ciphers;
    }
    return nettle_ciphers.has(spec->algorithm, spec->mode, spec->key_bytes) ? &nettle_ciphers : NULL;
}

static bool iv_valid(const tapfs_cipher *spec)
{
    if (spec->mode == TAPFS_CIPHER_ECB) {
        return spec->iv == TAPFS_IV_NONE;
    }
    return spec->iv == TAPFS_IV_PLAIN || spec->iv == TAPFS_IV_PLAIN64 ||
           (spec->iv == TAPFS_IV_ESSIV && memchr(spec->iv_digest, 0, sizeof spec->iv_digest) != NULL);
}

bool cipher_valid(const tapfs_cipher *spec)
{
    bool power = (spec->sector_bytes & (spec->sector_bytes - 1)) == 0;
    return spec->key_bytes <= sizeof spec->key && library_of(spec) != NULL && iv_valid(spec) &&
           spec->sector_bytes >= CIPHER_SECTOR_MIN && spec->sector_bytes <= CIPHER_SECTOR_MAX && power &&
           spec->iv_bytes > 0 && spec->sector_bytes % spec->iv_bytes == 0 && spec->iv_offset % spec->iv_bytes == 0;
}

/* ESSIV: the IV is the number, encrypted by the same algorithm under a digest of the key. */
static void *iv_cipher(const struct cipher *cipher)
{
    const tapfs_cipher *spec = &cipher->spec;
    uint8_t key[EVP_MAX_MD_SIZE];
    size_t bytes = 0;
    void *made = NULL;

    if (EVP_Q_digest(NULL, spec->iv_digest, NULL, spec->key, spec->key_bytes, key, &bytes) == 1 &&
        cipher->library->has(spec->algorithm, TAPFS_CIPHER_ECB, bytes)) {
        made = cipher->library->open(spec->algorithm, TAPFS_CIPHER_ECB, key, bytes);
    }
    OPENSSL_cleanse(key, sizeof key);
    return made;
}

struct cipher *cipher_new(const tapfs_cipher *spec)
{
    struct cipher *cipher = calloc(1, sizeof *cipher);
    if (cipher == NULL) {
        return NULL;
    }
    errno = 0;
    cipher->spec = *spec;
    cipher->library = library_of(spec);
    cipher->data = cipher->library->open(spec->algorithm, spec->mode, spec->key, spec->key_bytes);
    cipher->iv = spec->iv == TAPFS_IV_ESSIV ? iv_cipher(cipher) : NULL;
    /* The libraries have the key now. */
    OPENSSL_cleanse(cipher->spec.key, sizeof cipher->spec.key);
    if (cipher->data == NULL || (spec->iv == TAPFS_IV_ESSIV && cipher->iv == NULL)) {
        int error = errno == ENOMEM ? ENOMEM : EOPNOTSUPP;
        cipher_free(cipher);
        errno = error;
        return NULL;
    }
    return cipher;
}

void cipher_free(struct cipher *cipher)
{
    if (cipher == NULL) {
        return;
    }
    cipher->library->close(cipher->data);
    cipher->library->close(cipher->iv);
    free(cipher);
}

static int make_ivs(const struct cipher *cipher, uint64_t number, uint64_t step, uint8_t (*ivs)[CIPHER_IV_BYTES],
                    size_t count)
{
    for (size_t i = 0; i < count; i++, number += step) {
        uint64_t words[CIPHER_IV_BYTES / sizeof(uint64_t)] = {
            htole64(cipher->spec.iv == TAPFS_IV_PLAIN ? number & UINT32_MAX : number), 0};
        memcpy(ivs[i], words, sizeof words);
    }
    return cipher->iv == NULL
               ? 0
               : cipher->library->apply(cipher->iv, true, ivs[0], CIPHER_IV_BYTES * (uint32_t)count, NULL, 1);
}

int cipher_apply(struct cipher *cipher, bool encrypt, uint8_t *buffer, uint64_t guest, uint64_t host, uint64_t length)
{
    const tapfs_cipher *spec = &cipher->spec;
    uint64_t at = (spec->iv_from_host ? host : guest) - spec->iv_offset;
    uint64_t step = spec->sector_bytes / spec->iv_bytes;
    uint8_t ivs[SECTORS_AT_ONCE][CIPHER_IV_BYTES];
    int error = 0;

    for (uint64_t done = 0; done < length && error == 0;) {
        size_t count = (size_t)minimum((length - done) / spec->sector_bytes, SECTORS_AT_ONCE);
        error = make_ivs(cipher, (at + done) / spec->iv_bytes, step, ivs, count);
        if (error == 0) {
            error = cipher->library->apply(cipher->data, encrypt, buffer + done, spec->sector_bytes, ivs, count);
        }
        done += count * spec->sector_bytes;
    }
    return error;
}

int tapfs_cipher_apply(const tapfs_cipher *spec, int encrypt, uint8_t *buffer, uint64_t offset, uint64_t length)
{
    if (!cipher_valid(spec) || length % spec->sector_bytes != 0) {
        return -EINVAL;
    }
    struct cipher *cipher = cipher_new(spec);
    int error = cipher == NULL ? errno : cipher_apply(cipher, encrypt != 0, buffer, offset, offset, length);
    cipher_free(cipher);
    return -error;
}
