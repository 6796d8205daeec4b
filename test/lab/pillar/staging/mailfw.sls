mailfw:
  protection:
    type: private
  trusted:
    networks_ipv4:
      - 198.51.100.0/24
    networks_ipv6:
      - 2001:db8:0:2::/64
