//! Namespaces with links between them that delay packets and lose some.
//!
//! ```text
//!   core ── tunnel 1 ── relay ── tunnel 1 ── shard 1        each namespace has a cable of its own to the relay,
//!     └──── tunnel 2 ── relay ── tunnel 2 ── shard 2        and its tunnels run through that
//! ```
//!
//! This is what `tc netem` does where the kernel has it: packets of a tunnel (VXLAN) are datagrams, which a relay in this process takes, loses or
//! hands on later. TCP at both ends is the kernel's own. The cables lose nothing: clients come in over the core's.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rand_chacha::ChaCha8Rng;
use rand_core::{RngCore, SeedableRng};

/// Packets under way in one direction; more are lost, as in any buffer.
const BUFFER: usize = 4096;
/// Of the tunnels; each has the next port.
const FIRST_PORT: u16 = 47_890;
/// How often a relay looks whether it is to end.
const TICK: Duration = Duration::from_millis(100);

/// What a link does to a packet, in each direction.
#[derive(Debug, Clone, Copy)]
pub struct Harm {
    pub delay: Duration,
    /// 0 to 1.
    pub loss: f64,
}

pub const NO_HARM: Harm = Harm { delay: Duration::ZERO, loss: 0.0 };

/// The core and `shards` others. Everything goes when this does.
pub struct Network {
    relays: Vec<Relay>,
    spaces: Spaces,
    harm: Arc<Shared>,
}

/// Removes its namespaces, and with them what is in them.
struct Spaces(Vec<String>);

impl Drop for Spaces {
    fn drop(&mut self) {
        for name in &self.0 {
            // Nothing can be done about one that stays. Connections of ended processes keep what is inside for minutes: the cable goes at once.
            let _ = Command::new("ip").args(["link", "del", &cable_of(name)]).output();
            let _ = Command::new("ip").args(["netns", "del", name]).output();
        }
    }
}

/// What the cable of a namespace is called at this end.
fn cable_of(name: &str) -> String {
    name.replace("janua-", "jf")
}

impl Network {
    /// Fails where this machine does not allow it, with the reason.
    pub fn build(shards: usize) -> Result<Self, String> {
        sweep();
        let (id, mut spaces) = (std::process::id(), Spaces(Vec::new()));
        for at in 0..=shards {
            let name = format!("janua-{id}-{at}");
            let cable = cable_of(&name);
            spaces.0.push(name.clone());
            let [root, inside] = cable_addresses(at);
            ip(&format!("netns add {name}"))?;
            ip(&format!("link add {cable} mtu 1600 type veth peer name cable mtu 1600 netns {name}"))?;
            ip(&format!("addr add {root}/30 dev {cable}"))?;
            ip(&format!("link set {cable} up"))?;
            ip(&format!("-n {name} link set lo up"))?;
            ip(&format!("-n {name} addr add {inside}/30 dev cable"))?;
            ip(&format!("-n {name} link set cable up"))?;
        }
        let mut network = Self { relays: Vec::new(), spaces, harm: Arc::default() };
        for shard in 1..=shards {
            network.tunnel(0, shard, shard)?;
            network.tunnel(shard, shard, 0)?;
            let ends = [0, shard].map(|at| (cable_addresses(at), FIRST_PORT + shard as u16));
            network.relays.extend(Relay::both(ends, &network.harm).map_err(|error| format!("a relay: {error}"))?);
        }
        Ok(network)
    }

    /// The end of tunnel `number` in namespace `at`, whose other end is `peer`'s. Neighbours are known, so that no lost question for them counts.
    fn tunnel(&self, at: usize, number: usize, peer: usize) -> Result<(), String> {
        let (name, [root, inside], port) = (self.space(at), cable_addresses(at), FIRST_PORT + number as u16);
        let end = |at: usize| if at == 0 { (format!("10.9.{number}.1"), 1) } else { (format!("10.9.{number}.2"), 2) };
        let ((own, own_mac), (other, other_mac)) = (end(at), end(peer));
        let mac = |last: usize| format!("02:00:00:00:{number:02x}:{last:02x}");
        let device = format!("link{number}");
        let tunnel = format!("type vxlan id {number} local {inside} remote {root} dstport {port} nolearning");
        ip(&format!("-n {name} link add {device} address {} mtu 1500 gso_max_segs 1 {tunnel}", mac(own_mac)))?;
        ip(&format!("-n {name} addr add {own}/24 dev {device}"))?;
        ip(&format!("-n {name} link set {device} up"))?;
        ip(&format!("-n {name} neigh add {other} lladdr {} dev {device} nud permanent", mac(other_mac)))
    }

    /// The name of a namespace: 0 is the core.
    pub fn space(&self, at: usize) -> &str {
        &self.spaces.0[at]
    }

    /// Where the core is reached from here, past all links.
    pub fn core(&self) -> Ipv4Addr {
        cable_addresses(0)[1]
    }

    pub fn set(&self, harm: Harm) {
        self.harm.delay_nanos.store(harm.delay.as_nanos() as u64, Ordering::Relaxed);
        self.harm.loss.store((harm.loss * 2f64.powi(32)) as u64, Ordering::Relaxed);
    }

    /// Packets handed on and packets lost so far.
    pub fn counts(&self) -> [u64; 2] {
        [&self.harm.carried, &self.harm.lost].map(|count| count.load(Ordering::Relaxed))
    }

    /// Sets a sysctl in every namespace; `false` where the kernel does not know it.
    pub fn sysctl(&self, path: &str, value: &str) -> bool {
        let write = format!("echo {value} > /proc/sys/{path}");
        let set = |name: &String| Command::new("ip").args(["netns", "exec", name, "sh", "-c", &write]).output();
        self.spaces.0.iter().all(|name| set(name).is_ok_and(|output| output.status.success()))
    }
}

/// The addresses of a cable, here and in its namespace, in the range for such tests (198.18.0.0/15); processes seldom share them.
fn cable_addresses(at: usize) -> [Ipv4Addr; 2] {
    let base = u32::from(Ipv4Addr::new(198, 18, 0, 0)) + (std::process::id() % 8192) * 16 + 4 * at as u32;
    [1, 2].map(|last| Ipv4Addr::from(base + last))
}

/// Removes what processes have left that were killed.
fn sweep() {
    let Ok(names) = std::fs::read_dir("/run/netns") else { return };
    for name in names.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
        let pid = name.strip_prefix("janua-").and_then(|rest| rest.split_once('-')).map(|(pid, _)| pid.to_owned());
        if pid.is_some_and(|pid| !std::path::Path::new("/proc").join(pid).exists()) {
            drop(Spaces(vec![name]));
        }
    }
}

fn ip(args: &str) -> Result<(), String> {
    let output = Command::new("ip").args(args.split(' ')).output().map_err(|error| format!("ip: {error}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("ip {args}: {}", String::from_utf8_lossy(&output.stderr).trim())),
    }
}

#[derive(Default)]
struct Shared {
    delay_nanos: AtomicU64,
    /// Of 2^32 packets.
    loss: AtomicU64,
    carried: AtomicU64,
    lost: AtomicU64,
    stop: AtomicBool,
}

/// One direction of a link: a thread that takes and one that hands on.
struct Relay {
    harm: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Relay {
    /// Both directions between two ends, each given by its cable and the tunnel's port.
    fn both(ends: [([Ipv4Addr; 2], u16); 2], harm: &Arc<Shared>) -> io::Result<[Self; 2]> {
        let [a, b] = ends.map(|([root, _], port)| UdpSocket::bind((root, port)));
        let [a_at, b_at] = ends.map(|([_, inside], port)| SocketAddrV4::new(inside, port));
        let (a, b) = (a?, b?);
        Ok([Self::one(a.try_clone()?, b.try_clone()?, b_at, harm)?, Self::one(b, a, a_at, harm)?])
    }

    fn one(from: UdpSocket, to: UdpSocket, at: SocketAddrV4, harm: &Arc<Shared>) -> io::Result<Self> {
        from.set_read_timeout(Some(TICK))?;
        let (packets, later) = sync_channel(BUFFER);
        let (shared, taking) = (harm.clone(), harm.clone());
        let random = ChaCha8Rng::seed_from_u64(u64::from(at.port()) << 32 | u64::from(u32::from(*at.ip()) % 16));
        let take = std::thread::spawn(move || take(&from, &taking, &packets, random));
        let hand_on = std::thread::spawn(move || hand_on(&later, &to, at));
        Ok(Self { harm: shared, threads: vec![take, hand_on] })
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.harm.stop.store(true, Ordering::Relaxed);
        // A thread that panicked has ended, too.
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }
}

type Due = (Instant, Vec<u8>);

fn take(from: &UdpSocket, harm: &Shared, packets: &SyncSender<Due>, mut random: ChaCha8Rng) {
    let mut buffer = vec![0; 1 << 16];
    while !harm.stop.load(Ordering::Relaxed) {
        // Nothing for a while, or news of an end that is not there yet.
        let Ok(length) = from.recv(&mut buffer) else { continue };
        let due = Instant::now() + Duration::from_nanos(harm.delay_nanos.load(Ordering::Relaxed));
        let mut packet = buffer[..length].to_vec();
        complete(&mut packet);
        let is_lost = u64::from(random.next_u32()) < harm.loss.load(Ordering::Relaxed) || packets.try_send((due, packet)).is_err();
        if is_lost { &harm.lost } else { &harm.carried }.fetch_add(1, Ordering::Relaxed);
    }
}

fn hand_on(packets: &Receiver<Due>, to: &UdpSocket, at: SocketAddrV4) {
    while let Ok((due, packet)) = packets.recv() {
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        // Fails while its end is not there.
        let _ = to.send_to(&packet, at);
    }
}

/// Bytes before the packet of a tunnel's datagram: its own header, and the frame's.
const FRAME: usize = 8 + 14;
const TCP: u8 = 6;

/// Writes the checksum of a TCP packet, which its sender leaves to a network card that is not there.
fn complete(datagram: &mut [u8]) {
    let Some(packet) = datagram.get_mut(FRAME..).filter(|packet| packet.len() >= 20 && packet[0] >> 4 == 4 && packet[9] == TCP) else {
        return;
    };
    let (header, length) = (4 * usize::from(packet[0] & 15), usize::from(u16::from_be_bytes([packet[2], packet[3]])));
    if header + 20 > length || length > packet.len() {
        return;
    }
    packet[header + 16..header + 18].fill(0);
    let pseudo = [u32::from(TCP), (length - header) as u32];
    let words = packet[12..20].chunks(2).chain(packet[header..length].chunks(2));
    let sum: u32 = words.map(|word| u32::from(word[0]) << 8 | u32::from(word.get(1).copied().unwrap_or(0))).chain(pseudo).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let sum = !((folded & 0xffff) + (folded >> 16)) as u16;
    packet[header + 16..header + 18].copy_from_slice(&sum.to_be_bytes());
}
