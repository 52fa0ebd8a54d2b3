/* A stand-in for the engine that costs next to nothing: it streams a chat completion of --chunks chunks as fast as it
 * can, one write per chunk as uvicorn does it, all open streams in turn as continuous batching does it. Linux.
 *
 *   upstream (--uds PATH | --port N) [--chunks 65] [--step-us 0]
 *
 * --step-us N lets a step (one chunk to every open stream) take N microseconds, as an engine's steps do. Unknown
 * arguments are ignored, so that it can be started in vLLM's place. GETs and requests that do not ask for a stream get
 * a small answer at once.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { MAX_FDS = 4096, IN_SIZE = 256 * 1024, MAX_CHUNKS = 4096 };

#define CHUNK_HEAD "{\"id\":\"chatcmpl-4f1c0d2e9b7a4c58a3e6d1f0b2c49587\",\"object\":\"chat.completion.chunk\","      \
                   "\"created\":1700000000,\"model\":\"default\",\"choices\":[{\"index\":0,\"delta\":"

struct conn {
    char *in;
    size_t in_len;
    int streaming, next; /* chunk to send next */
    size_t sent;         /* bytes of it that are already out */
};

static struct conn *conns[MAX_FDS];
static int n_chunks = 65, n_streaming;
static char *pieces[MAX_CHUNKS + 3];
static size_t piece_len[MAX_CHUNKS + 3];
static int n_pieces;

static void die(const char *what) {
    perror(what);
    exit(1);
}

static void add_piece(const char *head, const char *data) {
    char event[1024], framed[2048];
    int n = snprintf(event, sizeof event, "data: %s\n\n", data);
    n = snprintf(framed, sizeof framed, "%s%x\r\n%s\r\n", head, n, event);
    pieces[n_pieces] = strdup(framed);
    piece_len[n_pieces++] = (size_t)n;
}

static void make_pieces(void) {
    char data[1024];
    const char *head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
                       "transfer-encoding: chunked\r\n\r\n";
    for (int i = 0; i < n_chunks; i++) {
        const char *delta = i == 0 ? "{\"role\":\"assistant\",\"content\":\"\"}" : "{\"content\":\" token\"}";
        const char *end = i == n_chunks - 1 ? "\"stop\"" : "null";
        snprintf(data, sizeof data, CHUNK_HEAD "%s,\"logprobs\":null,\"finish_reason\":%s}]}", delta, end);
        add_piece(i ? "" : head, data);
    }
    add_piece("", "[DONE]");
    pieces[n_pieces] = "0\r\n\r\n";
    piece_len[n_pieces++] = 5;
}

static void drop(int fd) {
    if (conns[fd]->streaming) n_streaming--;
    free(conns[fd]->in);
    free(conns[fd]);
    conns[fd] = NULL;
    close(fd);
}

/* One chunk to one stream; 0 when the connection is gone. */
static int step(int fd) {
    struct conn *c = conns[fd];
    ssize_t n = send(fd, pieces[c->next] + c->sent, piece_len[c->next] - c->sent, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n < 0) {
        if (errno == EAGAIN) return 1; /* the reader is slow: try again at the next step */
        drop(fd);
        return 0;
    }
    c->sent += (size_t)n;
    if (c->sent == piece_len[c->next]) {
        c->sent = 0;
        if (++c->next == n_pieces) c->streaming = 0, n_streaming--;
    }
    return 1;
}

static void answer(int fd, const char *type, const char *body) {
    char out[2048];
    int n = snprintf(out, sizeof out, "HTTP/1.1 200 OK\r\ncontent-type: %s\r\ncontent-length: %zu\r\n\r\n%s", type,
                     strlen(body), body);
    if (send(fd, out, (size_t)n, MSG_NOSIGNAL) != n) drop(fd);
}

static void take_request(int fd) {
    struct conn *c = conns[fd];
    char *end;
    c->in[c->in_len] = 0;
    while (conns[fd] && !c->streaming && (end = strstr(c->in, "\r\n\r\n"))) {
        *end = 0;
        char *field = strcasestr(c->in, "\r\ncontent-length:");
        size_t body = field ? strtoul(field + 17, NULL, 10) : 0, total = (size_t)(end - c->in) + 4 + body;
        int is_get = !strncmp(c->in, "GET ", 4);
        int is_metrics = strstr(c->in, "/metrics") != NULL;
        *end = '\r';
        if (total > c->in_len) return;
        char after = c->in[total];
        c->in[total] = 0;
        char *json = end + 4;
        int stream = strstr(json, "\"stream\":true") || strstr(json, "\"stream\": true");
        c->in[total] = after;
        memmove(c->in, c->in + total, c->in_len - total + 1);
        c->in_len -= total;
        if (is_get)
            answer(fd, is_metrics ? "text/plain" : "application/json", is_metrics ? "" : "{}");
        else if (stream)
            c->streaming = 1, c->next = 0, c->sent = 0, n_streaming++;
        else
            answer(fd, "application/json",
                   "{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion\",\"created\":1700000000,\"model\":\"default\","
                   "\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\" token\"},"
                   "\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":1,\"completion_tokens\":1,"
                   "\"total_tokens\":2}}");
    }
}

static int listen_on(const char *uds, int port) {
    int fd = socket(uds ? AF_UNIX : AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), one = 1;
    struct sockaddr_un un = {.sun_family = AF_UNIX};
    struct sockaddr_in in = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    in.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (uds) {
        snprintf(un.sun_path, sizeof un.sun_path, "%s", uds);
        unlink(uds);
    }
    if (bind(fd, uds ? (struct sockaddr *)&un : (struct sockaddr *)&in, uds ? sizeof un : sizeof in)) die("bind");
    if (listen(fd, 1024)) die("listen");
    return fd;
}

int main(int argc, char **argv) {
    const char *uds = NULL;
    int port = 0, step_us = 0;
    for (int i = 1; i + 1 < argc; i++) {
        if (!strcmp(argv[i], "--uds")) uds = argv[i + 1];
        if (!strcmp(argv[i], "--port")) port = atoi(argv[i + 1]);
        if (!strcmp(argv[i], "--chunks")) n_chunks = atoi(argv[i + 1]);
        if (!strcmp(argv[i], "--step-us")) step_us = atoi(argv[i + 1]);
    }
    if ((!uds && !port) || n_chunks < 2 || n_chunks > MAX_CHUNKS) {
        fprintf(stderr, "usage: upstream (--uds PATH | --port N) [--chunks 65] [--step-us 0]\n");
        return 2;
    }
    signal(SIGPIPE, SIG_IGN);
    make_pieces();
    int door = listen_on(uds, port), poll = epoll_create1(0);
    struct epoll_event events[256], interest = {.events = EPOLLIN, .data.fd = door};
    if (epoll_ctl(poll, EPOLL_CTL_ADD, door, &interest)) die("epoll_ctl");
    for (;;) {
        int n = epoll_wait(poll, events, 256, n_streaming ? 0 : -1);
        for (int i = 0; i < n; i++) {
            int fd = events[i].data.fd, one = 1;
            if (fd == door) {
                if ((fd = accept4(door, NULL, NULL, SOCK_NONBLOCK)) < 0) continue;
                if (fd >= MAX_FDS) die("too many connections");
                setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
                conns[fd] = calloc(1, sizeof *conns[fd]);
                conns[fd]->in = malloc(IN_SIZE + 1);
                interest = (struct epoll_event){.events = EPOLLIN, .data.fd = fd};
                if (epoll_ctl(poll, EPOLL_CTL_ADD, fd, &interest)) die("epoll_ctl");
                continue;
            }
            struct conn *c = conns[fd];
            ssize_t got = recv(fd, c->in + c->in_len, IN_SIZE - c->in_len, 0);
            if (got <= 0) {
                if (got == 0 || errno != EAGAIN) drop(fd);
                continue;
            }
            c->in_len += (size_t)got;
            take_request(fd);
        }
        if (!n_streaming) continue;
        if (step_us) nanosleep(&(struct timespec){.tv_nsec = step_us * 1000L}, NULL);
        for (int fd = 0; fd < MAX_FDS; fd++) {
            if (conns[fd] && conns[fd]->streaming && step(fd) && !conns[fd]->streaming) take_request(fd);
        }
    }
}
