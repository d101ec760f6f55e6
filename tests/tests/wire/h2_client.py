"""A foreign HBONE client: HTTP/2 CONNECT over mutual TLS, built on the `h2` package and Python's ssl (OpenSSL).

One argument, JSON: {"to": [ip, port], "cert": path, "key": path, "root": path, "requests": [
  {"method": "CONNECT", "authority": "ip:port", "headers": [[name, value]], "first": "not echoed", "send": "echoed", "repeat": n}]}
All requests go over one connection, one after another. Prints one JSON object: the TLS facts and the answers.
"""
import json
import socket
import ssl
import sys

import h2.connection
import h2.config
import h2.events


def main():
    job = json.loads(sys.argv[1])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # SPIFFE ids are URIs, which ssl does not compare; the name is reported instead
    context.load_verify_locations(job["root"])
    context.load_cert_chain(job["cert"], job["key"])
    context.set_alpn_protocols(["h2"])
    raw = socket.create_connection(tuple(job["to"]), timeout=10)
    result = {"answers": []}
    with context.wrap_socket(raw) as sock:
        certificate = sock.getpeercert()
        result["tls"] = {
            "version": sock.version(),
            "alpn": sock.selected_alpn_protocol(),
            "names": [value for kind, value in certificate.get("subjectAltName", ()) if kind == "URI"],
        }
        conn = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=True, header_encoding="utf-8", validate_outbound_headers=False)
        )
        conn.initiate_connection()
        sock.sendall(conn.data_to_send())
        for request in job["requests"]:
            result["answers"].append(run(sock, conn, request))
    print(json.dumps(result))


def run(sock, conn, request):
    stream = conn.get_next_available_stream_id()
    headers = [(":method", request.get("method", "CONNECT"))]
    if request.get("method", "CONNECT") != "CONNECT":
        headers += [(":scheme", "https"), (":path", "/")]
    headers += [(":authority", request["authority"])] + [tuple(pair) for pair in request.get("headers", [])]
    conn.send_headers(stream, headers)
    expected = request.get("send", "").encode() * request.get("repeat", 1)
    to_send = request.get("first", "").encode() + expected
    answer = {"status": None, "headers": {}, "received": 0, "matches": True, "reset": None}
    sent = got = 0
    ended = finished = False
    while not ended:
        accepted = answer["status"] == 200
        if accepted:
            while sent < len(to_send):
                room = min(conn.local_flow_control_window(stream), conn.max_outbound_frame_size, len(to_send) - sent)
                if room <= 0:
                    break
                conn.send_data(stream, to_send[sent:sent + room])
                sent += room
            if sent == len(to_send) and got >= len(expected) and not finished:
                conn.end_stream(stream)
                finished = True
        sock.sendall(conn.data_to_send())
        data = sock.recv(65536)
        if not data:
            answer["reset"] = "connection closed"
            return answer
        for event in conn.receive_data(data):
            if getattr(event, "stream_id", stream) != stream:
                continue
            if isinstance(event, h2.events.ResponseReceived):
                names = dict(event.headers)
                answer["status"] = int(names.pop(":status"))
                answer["headers"] = names
            elif isinstance(event, h2.events.DataReceived):
                answer["matches"] &= event.data == expected[got:got + len(event.data)] or answer["status"] != 200
                got += len(event.data)
                answer["received"] = got
                conn.acknowledge_received_data(event.flow_controlled_length, stream)
            elif isinstance(event, h2.events.StreamEnded):
                ended = True
            elif isinstance(event, h2.events.StreamReset):
                answer["reset"] = int(event.error_code)
                ended = True
            elif isinstance(event, h2.events.ConnectionTerminated):
                answer["reset"] = "goaway"
    sock.sendall(conn.data_to_send())
    return answer


main()
