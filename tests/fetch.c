/* Get a page by HTTP, by getaddrinfo(): linked statically with musl, it resolves names itself. */
#include <netdb.h>
#include <stdio.h>
#include <sys/socket.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found;
    char text[1024];
    ssize_t size;

    if (argc != 3)
        return 2;
    int error = getaddrinfo(argv[1], "80", &hints, &found);
    if (error) {
        fprintf(stderr, "%s\n", gai_strerror(error));
        return 1;
    }
    int s = socket(found->ai_family, SOCK_STREAM, 0);
    if (connect(s, found->ai_addr, found->ai_addrlen)) {
        perror("connect");
        return 1;
    }
    dprintf(s, "GET %s HTTP/1.0\r\nHost: %s\r\n\r\n", argv[2], argv[1]);
    while ((size = read(s, text, sizeof text)) > 0)
        fwrite(text, 1, size, stdout);
    return 0;
}
