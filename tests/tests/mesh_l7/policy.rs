//! Who may do what, judged by the waypoint.
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use mesh_tests::agent::Metrics;
use mesh_tests::raw::Raw;
use mesh_tests::wait;
use serde_json::Value;

use crate::bytes::{upgraded, vip};
use crate::mesh::{Got, MORE, Mesh, OTHER, ObjectsForNow, WEB, WEB_IP};

/// An AuthorizationPolicy of this namespace for the time of the guard.
fn policy<'m>(mesh: &'m Mesh, name: &str, annotations: &str, spec: &str) -> anyhow::Result<ObjectsForNow<'m>> {
    let yaml = format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{ name: {name}, namespace: t, annotations: {{ {annotations} }} }}\nspec: {spec}\n"
    );
    mesh.objects(&format!("policy-{name}"), &yaml)
}
/// A policy of the service `web`.
pub(crate) fn of_web<'m>(mesh: &'m Mesh, name: &str, action_and_rules: &str) -> anyhow::Result<ObjectsForNow<'m>> {
    policy(mesh, name, "", &format!("{{ targetRefs: [{{ kind: Service, name: web }}], {action_and_rules} }}"))
}
pub(crate) fn refused(got: &Got, reason: &str) -> anyhow::Result<()> {
    ensure!(got.status == 403 && got.body == "RBAC: access denied", "{got:?}");
    ensure!(got.header("x-culvert-reason") == Some(reason), "{got:?}");
    Ok(())
}
/// The waypoint's next log line about something with this text.
pub(crate) fn line(mesh: &Mesh, mark: mesh_tests::agent::Mark, text: &str) -> anyhow::Result<Value> {
    wait::until(text, wait::PATIENCE, || {
        let log = mesh.proxy("wp").log_since(mark);
        log.lines().filter(|l| l.contains("response_code") && l.contains(text)).find_map(|l| serde_json::from_str(l).ok())
    })
}

pub(crate) fn a_policy_that_cannot_be_read_closes(mesh: &mut Mesh) -> anyhow::Result<()> {
    let (web, other) = (format!("http://{WEB}/unreadable"), format!("http://{OTHER}/unreadable"));
    {
        let _bad = of_web(mesh, "bad", "action: DENNY, rules: [{ to: [{ operation: { paths: [/x] } }] }]")?;
        let mark = mesh.proxy("wp").mark();
        refused(&mesh.call(&[&web])?, "policy_unusable")?;
        let line = line(mesh, mark, "/unreadable")?;
        ensure!(line["reason"] == "policy_unusable", "{line}");
        ensure!(line["response_code_details"].as_str().is_some_and(|d| d.contains("ns[t]-policy[bad]")), "{line}");
        ensure!(mesh.call(&[&other])?.status == 200, "what it names is closed, nothing else");
    }
    {
        let _bad = policy(mesh, "bad", "", "{ targetRefs: [{ kind: Service }], action: DENY, rules: [{}] }")?;
        refused(&mesh.call(&[&web])?, "policy_unusable")?;
        refused(&mesh.call(&[&other])?, "policy_unusable")?;
    }
    {
        // Two copies that do not agree: neither counts.
        let _one = of_web(mesh, "twice", "action: DENY, rules: [{ to: [{ operation: { paths: [/x] } }] }]")?;
        ensure!(mesh.call(&[&web])?.status == 200);
        let copy = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: { name: twice, namespace: t }\nspec: { targetRefs: [{ kind: Service, name: web }], action: DENY }\n";
        let _other = mesh.objects("policy-copy", copy)?;
        refused(&mesh.call(&[&web])?, "policy_unusable")?;
        ensure!(mesh.call(&[&other])?.status == 200);
    }
    ensure!(mesh.call(&[&web])?.status == 200);
    Ok(())
}

pub(crate) fn a_further_header_value_hides_nothing(mesh: &mut Mesh) -> anyhow::Result<()> {
    let call = |roles: &[&str]| {
        let headers: Vec<String> = roles.iter().map(|role| format!("x-role: {role}")).collect();
        let mut args: Vec<&str> = headers.iter().flat_map(|h| ["-H", h]).collect();
        let url = format!("http://{WEB}/");
        args.push(&url);
        mesh.call(&args)
    };
    {
        let when = "rules: [{ when: [{ key: 'request.headers[x-role]', values: [guest] }] }]";
        let _deny = of_web(mesh, "deny", &format!("action: DENY, {when}"))?;
        for roles in [&["guest"][..], &["guest", "admin"], &["admin", "guest"]] {
            refused(&call(roles)?, "policy_denied")?;
        }
        ensure!(call(&["admin"])?.status == 200);
    }
    let when = "rules: [{ when: [{ key: 'request.headers[x-role]', values: [admin] }] }]";
    let _allow = of_web(mesh, "allow", &format!("action: ALLOW, {when}"))?;
    ensure!(call(&["admin"])?.status == 200);
    for roles in [&["guest"][..], &["guest", "admin"], &["admin", "guest"], &[]] {
        refused(&call(roles)?, "not_allowed")?;
    }
    // Policy comes before the route: an outsider does not learn what is there.
    let routes = "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: { name: web, namespace: t }\nspec: { hosts: [ web ], http: [ { match: [ { uri: { exact: /there } } ], route: [ { destination: { host: web } } ] } ] }\n";
    let _routes = mesh.objects("policy-routes", routes)?;
    refused(&call(&["guest"])?, "not_allowed")?;
    ensure!(call(&["admin"])?.status == 404);
    Ok(())
}

pub(crate) fn a_path_by_another_name_is_judged_as_itself(mesh: &mut Mesh) -> anyhow::Result<()> {
    let ask = |path: &str| mesh.call(&["--path-as-is", &format!("http://{WEB}{path}")]);
    {
        let _deny = of_web(mesh, "deny", "action: DENY, rules: [{ to: [{ operation: { paths: [/admin, /admin/*] } }] }]")?;
        for path in [
            "/admin",
            "/admin?x=/open",
            "/admin/x",
            "/./admin/x",
            "/a/../admin/x",
            "/a/%2e%2E/admin/x",
            "/a/.%2e/admin/x",
            "/%61dmin/x",
            "/admin/../admin/x",
            "/a/..;/admin/x",
            "/a/..;b=c/admin/x",
            "/a/..\\admin/x",
            "/a\\..\\admin\\x",
        ] {
            let got = ask(path)?;
            refused(&got, "policy_denied").with_context(|| path.to_owned())?;
        }
        // What is judged is what arrives.
        for (path, arrives) in [("/a/../b", "/b"), ("/admin/../open", "/open"), ("/a\\b", "/a/b")] {
            let got = ask(path)?;
            ensure!(got.status == 200 && got.echo()?["path"] == arrives, "{path}: {got:?}");
        }
    }
    // A list of what is allowed is not left by any of them; runs of slashes and escaped ones are other paths unless merged.
    let _allow = of_web(mesh, "allow", "action: ALLOW, rules: [{ to: [{ operation: { paths: [/open/*] } }] }]")?;
    ensure!(ask("/open/x")?.status == 200);
    for path in [
        "//admin",
        "//open/x",
        "/open/../admin",
        "/open/..;/admin",
        "/open%2fx",
        "/open%2f..%2fadmin",
        "/open\\..\\admin",
        "/OPEN/x",
    ] {
        refused(&ask(path)?, "not_allowed").with_context(|| path.to_owned())?;
    }
    Ok(())
}

/// A host that is refused, as clients may also write it.
pub(crate) fn a_host_by_another_name_is_judged_as_itself(mesh: &mut Mesh) -> anyhow::Result<()> {
    let ask = |line: &str, hosts: &[&str]| -> anyhow::Result<(u16, Option<String>)> {
        let fields = hosts.iter().map(|host| format!("host: {host}")).collect::<Vec<_>>().join("\r\n");
        let head = format!("GET {line} HTTP/1.1\r\n{fields}\r\nconnection: close\r\n\r\n");
        let mut raw = Raw::say(mesh.pod("client"), (WEB_IP, 80).into(), head.as_bytes())?;
        let answer = raw.answer().with_context(|| head.clone())?;
        Ok((answer.status, answer.header("x-culvert-reason").map(str::to_owned)))
    };
    {
        let _deny = of_web(mesh, "deny", "action: DENY, rules: [{ to: [{ operation: { hosts: [bad.example] } }] }]")?;
        let denied = (403, Some("policy_denied".to_owned()));
        for host in ["bad.example", "BAD.example", "bad.example:80", "bad.example:8080", "bad.example.", "Bad.Example.:80"] {
            ensure!(ask("/", &[host])? == denied, "{host}");
        }
        // The target's own authority is the host, whatever the field says.
        for (line, host) in [("http://bad.example/", "good.example"), ("http://BAD.example:80/", "good.example")] {
            ensure!(ask(line, &[host])? == denied, "{line} with {host}");
        }
        ensure!(ask("http://good.example/", &["bad.example"])?.0 == 200, "as whom the endpoint is asked");
        for hosts in
            [&["good.example", "bad.example"][..], &["good.example@bad.example"], &["bad.example/x"], &["bad example"], &[""]]
        {
            ensure!(ask("/", hosts)?.0 == 400, "{hosts:?}");
        }
        ensure!(ask("/", &["bad.example.evil"])?.0 == 200, "another host");
    }
    let _allow = of_web(mesh, "allow", "action: ALLOW, rules: [{ to: [{ operation: { hosts: [good.example] } }] }]")?;
    ensure!(ask("/", &["good.example"])?.0 == 200);
    let refused = (403, Some("not_allowed".to_owned()));
    for host in ["bad.example", "good.example.evil", "xgood.example", "good.example..", "[good.example]"] {
        ensure!(ask("/", &[host])? == refused, "{host}");
    }
    ensure!(ask("http://bad.example/", &["good.example"])? == refused, "the target's authority counts");
    Ok(())
}

/// Whether the other end closed the stream.
pub(crate) fn closed(stream: &mut TcpStream) -> anyhow::Result<()> {
    let mut rest = [0; 64];
    match stream.read(&mut rest) {
        Ok(0) => Ok(()),
        Err(error) if error.kind() != std::io::ErrorKind::WouldBlock => Ok(()),
        other => anyhow::bail!("not closed: {other:?}"),
    }
}

pub(crate) fn what_lives_on_is_judged_again(mesh: &mut Mesh) -> anyhow::Result<()> {
    let limit = Duration::from_secs(5);
    // An upgraded request.
    let mut chat = upgraded(mesh)?;
    // A connection of bytes.
    let _heard = hear(mesh)?;
    let mut bytes = mesh.pod("client").netns.connect(vip(92), limit)?;
    bytes.set_read_timeout(Some(limit))?;
    let ping = |stream: &mut TcpStream| -> anyhow::Result<()> {
        let mut back = [0; 4];
        stream.write_all(b"\x01abc")?;
        stream.read_exact(&mut back)?;
        ensure!(&back == b"\x01abc");
        Ok(())
    };
    ping(&mut bytes)?;
    ping(&mut chat)?;
    {
        let _elsewhere = of_web(mesh, "else", "action: DENY, rules: [{ to: [{ operation: { ports: ['91'] } }] }]")?;
        ping(&mut bytes).context("a policy about something else")?;
        ping(&mut chat).context("a policy about something else")?;
    }
    {
        let _chat = of_web(mesh, "chat", "action: DENY, rules: [{ to: [{ operation: { paths: [/chat], ports: ['80'] } }] }]")?;
        closed(&mut chat)?;
        ping(&mut bytes)?;
    }
    let mark = mesh.proxy("wp").mark();
    let _bytes = of_web(mesh, "raw", "action: DENY, rules: [{ to: [{ operation: { ports: ['92'] } }] }]")?;
    closed(&mut bytes)?;
    let cut = line(mesh, mark, "policy[raw]")?;
    ensure!(cut["reason"] == "revoked", "{cut}");
    // And what comes new is refused, by name.
    let mark = mesh.proxy("wp").mark();
    let mut again = mesh.pod("client").netns.connect(vip(92), limit)?;
    again.set_read_timeout(Some(limit))?;
    let _ = again.write_all(b"\x01abc");
    closed(&mut again)?;
    let line = line(mesh, mark, "policy[raw]")?;
    ensure!(line["reason"] == "policy_denied", "{line}");
    let details = "rbac_access_denied_matched_policy[ns[t]-policy[raw]-rule[0]]";
    ensure!(line["connection_termination_details"] == details, "{line}");
    Ok(())
}

/// What the servers heard; they end with it.
pub(crate) struct Heard {
    pub(crate) pieces: Receiver<Vec<u8>>,
    pub(crate) open: Arc<AtomicBool>,
    pub(crate) listening: Vec<thread::JoinHandle<()>>,
}
impl Drop for Heard {
    fn drop(&mut self) {
        self.open.store(false, Ordering::Relaxed);
        for thread in self.listening.drain(..) {
            let _ended = thread.join();
        }
    }
}
/// Echoes on the byte port of both servers, and gives every piece that came.
pub(crate) fn hear(mesh: &Mesh) -> anyhow::Result<Heard> {
    let (tell, pieces) = channel();
    let open = Arc::new(AtomicBool::new(true));
    let mut listening = Vec::new();
    for name in ["web1", "web2"] {
        let place = mesh.pod(name);
        let listener = place.netns.listen((place.v4, MORE).into())?;
        listener.set_nonblocking(true)?;
        let (tell, open) = (tell.clone(), Arc::clone(&open));
        listening.push(thread::spawn(move || {
            while open.load(Ordering::Relaxed) {
                let Ok((mut stream, _)) = listener.accept() else {
                    thread::sleep(Duration::from_millis(5));
                    continue;
                };
                let tell = tell.clone();
                thread::spawn(move || {
                    let _ = stream.set_nonblocking(false);
                    let mut piece = [0; 4096];
                    while let Ok(n @ 1..) = stream.read(&mut piece) {
                        let _ = tell.send(piece[..n].to_vec());
                        let _ = stream.write_all(&piece[..n]);
                    }
                });
            }
        }));
    }
    Ok(Heard { pieces, open, listening })
}

pub(crate) fn a_name_in_tls_through_a_tunnel_is_judged(mesh: &mut Mesh) -> anyhow::Result<()> {
    let heard = hear(mesh)?;
    let deny = "action: DENY, rules: [{ when: [{ key: connection.sni, values: [shut.example] }] }]";
    let _deny = of_web(mesh, "sni", deny)?;
    let hello = |name: &str| {
        let resolve = format!("{name}:92:{WEB}");
        // Nobody answers the hello as TLS; what counts is who hears it.
        let _no_tls = mesh.call(&["-k", "--max-time", "3", "--resolve", &resolve, &format!("https://{name}:92/")]);
    };
    let limit = Duration::from_secs(5);
    // A client that gives up says so in a record of its own, which may be heard late.
    let is_hello = |piece: &Vec<u8>| piece.first() == Some(&0x16);
    let next_hello = || -> anyhow::Result<Vec<u8>> {
        loop {
            let piece = heard.pieces.recv_timeout(limit).context("the hello of open.example")?;
            if is_hello(&piece) {
                return Ok(piece);
            }
        }
    };
    hello("open.example");
    let open = next_hello()?;
    let mark = mesh.proxy("wp").mark();
    hello("shut.example");
    let line = line(mesh, mark, "shut.example")?;
    ensure!(line["reason"] == "policy_denied" && line["requested_server_name"] == "shut.example", "{line}");
    // A hello that comes late, when nobody waits for one any more, hides no name.
    let at = open.windows(12).position(|w| w == b"open.example").context("the name in the hello")?;
    let mut shut = open.clone();
    shut[at..at + 12].copy_from_slice(b"shut.example");
    for (hello, passes) in [(open, true), (shut, false)] {
        let mut late = mesh.pod("client").netns.connect(vip(92), limit)?;
        late.set_read_timeout(Some(limit))?;
        thread::sleep(Duration::from_millis(400));
        late.write_all(&hello)?;
        if passes {
            let mut back = [0; 1];
            late.read_exact(&mut back).context("the echo of open.example")?;
            next_hello()?;
        } else {
            closed(&mut late)?;
            ensure!(!heard.pieces.try_iter().any(|piece| is_hello(&piece)), "nothing of it reached a server");
        }
    }
    Ok(())
}

pub(crate) fn dry_runs_and_audits_are_told_only(mesh: &mut Mesh) -> anyhow::Result<()> {
    let shadow = |policy: &str, result: &str| -> anyhow::Result<f64> {
        let pod = mesh.pod("wp");
        let page = mesh_tests::http::get(&pod.netns, (pod.v4, 15020).into(), "/metrics")?.body;
        Ok(Metrics::parse(&page).sum("culvert_policy_shadow_total", &[("policy", policy), ("result", result)]))
    };
    let to_web = "targetRefs: [{ kind: Service, name: web }]";
    let _dry = policy(mesh, "dry", "istio.io/dry-run: 'true'", &format!("{{ {to_web}, action: DENY, rules: [{{}}] }}"))?;
    let _audit = of_web(mesh, "audit", "action: AUDIT, rules: [{}]")?;
    let mark = mesh.proxy("wp").mark();
    ensure!(mesh.call(&[&format!("http://{WEB}/shadow")])?.status == 200, "nothing is enforced");
    let line = line(mesh, mark, "/shadow")?;
    ensure!(line["dry_run"] == "rbac_access_denied_matched_policy[ns[t]-policy[dry]-rule[0]]", "{line}");
    ensure!(line["audit"] == "t/audit", "{line}");
    wait::until_true("both to be counted", || {
        [("t/dry", "denied"), ("t/audit", "audited")]
            .iter()
            .all(|(policy, result)| shadow(policy, result).is_ok_and(|n| n as u64 == 1))
    })
}

pub(crate) fn what_can_never_apply_is_told(mesh: &mut Mesh) -> anyhow::Result<()> {
    let _lost = policy(mesh, "lost", "", "{ targetRefs: [{ kind: Service, name: nowhere }], action: DENY, rules: [{}] }")?;
    wait::until("the problem in the dump", wait::PATIENCE, || {
        let dump = mesh.proxy("wp").config_dump().ok()?;
        let told = |p: &Value| p.to_string().contains("t/nowhere does not exist") && p.to_string().contains("can never apply");
        dump["problems"].as_array()?.iter().any(told).then_some(())
    })
}
