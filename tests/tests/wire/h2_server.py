"""A foreign HBONE server: accepts HTTP/2 CONNECT over mutual TLS on port 15008 and echoes.

Arguments: certificate, key, root, file for the record. Appends one JSON object per CONNECT to the record.
The port of the authority chooses the answer: 8401 → 401, 8503 → 503, 8999 → the stream is reset, 8998 → no answer,
anything else → 200 and an echo.
"""
import json
import socket
import ssl
import sys
import threading

import h2.config
import h2.connection
import h2.errors
import h2.events

LOCK = threading.Lock()


def main():
    cert, key, root, record = sys.argv[1:5]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    context.load_verify_locations(root)
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols(["h2"])
    names = {}
    context.sni_callback = lambda sock, name, _: names.__setitem__(id(sock), name)
    listener = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    listener.bind(("::", 15008))
    listener.listen(128)
    while True:
        raw, peer = listener.accept()
        threading.Thread(target=serve, args=(context, raw, peer, record, names), daemon=True).start()


def note(record, entry):
    with LOCK, open(record, "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def serve(context, raw, peer, record, names):
    try:
        raw.settimeout(60)
        sock = context.wrap_socket(raw, server_side=True)
    except OSError as error:
        note(record, {"failed": str(error)})
        return
    facts = {
        "peer": peer[0],
        "tls": sock.version(),
        "alpn": sock.selected_alpn_protocol(),
        "sni": names.pop(id(sock), None),
        "names": [value for kind, value in sock.getpeercert().get("subjectAltName", ()) if kind == "URI"],
    }
    conn = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
    conn.initiate_connection()
    sock.sendall(conn.data_to_send())
    waiting = {}
    ended = set()
    try:
        while True:
            data = sock.recv(65536)
            if not data:
                return
            for event in conn.receive_data(data):
                if isinstance(event, h2.events.RequestReceived):
                    headers = dict(event.headers)
                    note(record, {**facts, "headers": headers})
                    answer(conn, event.stream_id, headers.get(":authority", ""))
                    waiting[event.stream_id] = b""
                elif isinstance(event, h2.events.DataReceived):
                    waiting[event.stream_id] = waiting.get(event.stream_id, b"") + event.data
                    conn.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                elif isinstance(event, h2.events.StreamEnded):
                    ended.add(event.stream_id)
                elif isinstance(event, h2.events.StreamReset):
                    note(record, {**facts, "reset": int(event.error_code)})
                    waiting.pop(event.stream_id, None)
            for stream, held in list(waiting.items()):
                try:
                    while held:
                        room = min(conn.local_flow_control_window(stream), conn.max_outbound_frame_size, len(held))
                        if room <= 0:
                            break
                        conn.send_data(stream, held[:room])
                        held = held[room:]
                    waiting[stream] = held
                    if not held and stream in ended:
                        conn.end_stream(stream)
                        waiting.pop(stream)
                except Exception:  # the stream is closed: nothing to echo to
                    waiting.pop(stream, None)
            sock.sendall(conn.data_to_send())
    except OSError:
        return


def answer(conn, stream, authority):
    port = authority.rsplit(":", 1)[-1]
    if port == "8401":
        conn.send_headers(stream, [(":status", "401"), ("x-culvert-reason", "not_allowed")], end_stream=True)
    elif port == "8503":
        conn.send_headers(stream, [(":status", "503")], end_stream=True)
    elif port == "8999":
        conn.reset_stream(stream, h2.errors.ErrorCodes.REFUSED_STREAM)
    elif port == "8998":
        pass
    else:
        conn.send_headers(stream, [(":status", "200"), ("baggage", "k8s.namespace.name=t,k8s.pod.name=foreign")])


main()
