/*
 * Ciphers of libnettle, which the engine is not linked with: Serpent, Twofish, CAST5, and AES-192 in XTS mode. Few
 * images are encrypted by them, so the library is opened when a disk first needs it.
 */
#include <dlfcn.h>
#include <errno.h>
#include <openssl/crypto.h>
#include <stdlib.h>
#include <string.h>

#include "engine/cipher.h"

/* As the headers of libnettle declare them. */
typedef void (*block_function)(const void *context, size_t length, uint8_t *out, const uint8_t *in);
typedef void (*set_key_function)(void *context, const uint8_t *key);
typedef void (*chain_function)(const void *context, block_function block, size_t block_bytes, uint8_t *iv,
                               size_t length, uint8_t *out, const uint8_t *in);
typedef void (*xts_encrypt_function)(const void *data, const void *tweak, block_function block, const uint8_t *iv,
                                     size_t length, uint8_t *out, const uint8_t *in);
typedef void (*xts_decrypt_function)(const void *data, const void *tweak, block_function decrypt,
                                     block_function encrypt, const uint8_t *iv, size_t length, uint8_t *out,
                                     const uint8_t *in);
struct description {
    const char *name;
    unsigned context_bytes, block_bytes, key_bytes;
    set_key_function set_encrypt_key, set_decrypt_key;
    block_function encrypt, decrypt;
};

static const struct {
    uint32_t algorithm;
    size_t key_bytes;
    const char *symbol;
} names[] = {
    {TAPFS_CIPHER_AES, 16, "nettle_aes128"},         {TAPFS_CIPHER_AES, 24, "nettle_aes192"},
    {TAPFS_CIPHER_AES, 32, "nettle_aes256"},         {TAPFS_CIPHER_SERPENT, 16, "nettle_serpent128"},
    {TAPFS_CIPHER_SERPENT, 24, "nettle_serpent192"}, {TAPFS_CIPHER_SERPENT, 32, "nettle_serpent256"},
    {TAPFS_CIPHER_TWOFISH, 16, "nettle_twofish128"}, {TAPFS_CIPHER_TWOFISH, 24, "nettle_twofish192"},
    {TAPFS_CIPHER_TWOFISH, 32, "nettle_twofish256"}, {TAPFS_CIPHER_CAST5, 16, "nettle_cast128"},
};
#define NAMES (sizeof names / sizeof names[0])

/* Filled by whoever opens the library, before `ready`, and never changed after it. */
static struct {
    const struct description *ciphers[NAMES];
    chain_function cbc_encrypt, cbc_decrypt, ctr;
    xts_encrypt_function xts_encrypt;
    xts_decrypt_function xts_decrypt;
} library;
static pthread_mutex_t opening = PTHREAD_MUTEX_INITIALIZER;
static atomic_bool ready;

static bool look_up(void *handle, const char *symbol, void *function)
{
    void *found = dlsym(handle, symbol);
    memcpy(function, &found, sizeof found);
    return found != NULL;
}

static bool take_symbols(void *handle)
{
    bool all = look_up(handle, "nettle_cbc_encrypt", &library.cbc_encrypt) &&
               look_up(handle, "nettle_cbc_decrypt", &library.cbc_decrypt) &&
               look_up(handle, "nettle_ctr_crypt", &library.ctr) &&
               look_up(handle, "nettle_xts_encrypt_message", &library.xts_encrypt) &&
               look_up(handle, "nettle_xts_decrypt_message", &library.xts_decrypt);
    for (size_t i = 0; i < NAMES && all; i++) {
        all = look_up(handle, names[i].symbol, &library.ciphers[i]);
    }
    return all;
}

int tapfs_cipher_library(const char *path)
{
    int result = 0;

    pthread_mutex_lock(&opening);
    if (!atomic_load(&ready)) {
        void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        if (handle != NULL && take_symbols(handle)) {
            atomic_store(&ready, true);
        } else {
            result = -ENOPKG;
            if (handle != NULL) {
                dlclose(handle);
            }
        }
    }
    pthread_mutex_unlock(&opening);
    return result;
}

static const struct description *find(uint32_t algorithm, size_t key_bytes)
{
    for (size_t i = 0; i < NAMES && atomic_load(&ready); i++) {
        if (names[i].algorithm == algorithm && names[i].key_bytes == key_bytes) {
            return library.ciphers[i];
        }
    }
    return NULL;
}

static bool has(uint32_t algorithm, uint32_t mode, size_t key_bytes)
{
    bool xts = mode == TAPFS_CIPHER_XTS;
    const struct description *found = key_bytes % 2 != 0 ? NULL : find(algorithm, xts ? key_bytes / 2 : key_bytes);
    return found != NULL && (!xts || found->block_bytes == CIPHER_IV_BYTES) &&
           (xts || mode == TAPFS_CIPHER_ECB || mode == TAPFS_CIPHER_CBC || mode == TAPFS_CIPHER_CTR);
}

/* The contexts are read only once their keys are set, so all threads share them. */
struct nettle_cipher {
    const struct description *description;
    uint32_t mode;
    void *encrypt, *decrypt, *tweak; /* contexts; `tweak` for XTS */
};

static void wipe(const struct nettle_cipher *cipher, void *context)
{
    if (context != NULL) {
        OPENSSL_cleanse(context, cipher->description->context_bytes);
    }
    free(context);
}

static void close_cipher(void *opened)
{
    struct nettle_cipher *cipher = opened;
    if (cipher == NULL) {
        return;
    }
    wipe(cipher, cipher->encrypt);
    wipe(cipher, cipher->decrypt);
    wipe(cipher, cipher->tweak);
    free(cipher);
}

static void *keyed(const struct description *description, set_key_function set_key, const uint8_t *key)
{
    /* Some of the library's contexts want the alignment of a vector. */
    void *context = aligned_alloc(64, round_up(description->context_bytes, 64));
    if (context != NULL) {
        set_key(context, key);
    }
    return context;
}

static void *open_cipher(uint32_t algorithm, uint32_t mode, const uint8_t *key, size_t key_bytes)
{
    bool xts = mode == TAPFS_CIPHER_XTS;
    const struct description *description = find(algorithm, xts ? key_bytes / 2 : key_bytes);
    struct nettle_cipher *cipher = calloc(1, sizeof *cipher);
    if (cipher == NULL || description == NULL) {
        free(cipher);
        return NULL;
    }
    cipher->description = description;
    cipher->mode = mode;
    cipher->encrypt = keyed(description, description->set_encrypt_key, key);
    cipher->decrypt = keyed(description, description->set_decrypt_key, key);
    cipher->tweak = xts ? keyed(description, description->set_encrypt_key, key + key_bytes / 2) : NULL;
    if (cipher->encrypt == NULL || cipher->decrypt == NULL || (xts && cipher->tweak == NULL)) {
        close_cipher(cipher);
        return NULL;
    }
    return cipher;
}

static int apply(void *opened, bool encrypt, uint8_t *buffer, uint32_t bytes, uint8_t (*ivs)[CIPHER_IV_BYTES],
                 size_t count)
{
    const struct nettle_cipher *cipher = opened;
    const struct description *of = cipher->description;
    const void *context = encrypt ? cipher->encrypt : cipher->decrypt;
    block_function block = encrypt ? of->encrypt : of->decrypt;

    for (size_t i = 0; i < count; i++) {
        uint8_t *sector = buffer + i * bytes;
        switch (cipher->mode) {
        case TAPFS_CIPHER_CBC:
            (encrypt ? library.cbc_encrypt : library.cbc_decrypt)(context, block, of->block_bytes, ivs[i], bytes,
                                                                  sector, sector);
            break;
        case TAPFS_CIPHER_CTR:
            library.ctr(cipher->encrypt, of->encrypt, of->block_bytes, ivs[i], bytes, sector, sector);
            break;
        case TAPFS_CIPHER_XTS:
            if (encrypt) {
                library.xts_encrypt(context, cipher->tweak, block, ivs[i], bytes, sector, sector);
            } else {
                library.xts_decrypt(context, cipher->tweak, block, of->encrypt, ivs[i], bytes, sector, sector);
            }
            break;
        default:
            block(context, bytes, sector, sector);
        }
    }
    return 0;
}

const struct cipher_library nettle_ciphers = {
    .has = has, .open = open_cipher, .close = close_cipher, .apply = apply};
